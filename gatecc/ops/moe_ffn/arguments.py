"""What may be given to ``gatecc::moe_ffn``, and the sizes that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ops.moe_ffn.activations import LAYOUTS, Activation, Layout, activation

Combine = Literal["sum", "slots"]
TENSORS = 7  # of the operator's arguments
DIFFERENTIABLE: tuple[int, ...] = (0, 1, 3, 4, 5, 6)  # all but the indices


class Arguments(NamedTuple):
    """The arguments of one call, checked. Sizes may be symbolic.

    x: (T, d), weights: (T, k), indices: (T, k) from 0 to E, gate_up: (E, rows, d) where rows is 2F, or F without a
    gate, down: (E, o, F), gate_up_bias: (E, rows), down_bias: (E, o).
    """

    x: Tensor
    weights: Tensor
    indices: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Activation
    layout: Layout
    combine: Combine

    @property
    def tokens(self) -> int:
        """T."""
        return self.x.size(0)

    @property
    def slots(self) -> int:
        """k, how many experts a token may have."""
        return self.indices.size(1)

    @property
    def experts(self) -> int:
        """E."""
        return self.gate_up.size(0)

    @property
    def wide(self) -> torch.dtype:
        """In which slots are weighted and summed: float32; float64 for float64."""
        return torch.promote_types(self.x.dtype, torch.float32)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(T, o), or (T, k, o)."""
        T, o = self.tokens, self.down.size(1)
        return (T, o) if self.combine == "sum" else (T, self.slots, o)

    @property
    def hidden_shape(self) -> tuple[int, int]:
        """(T k, rows), of what is kept for the gradient: a row for each slot, by expert, empty slots last."""
        return self.tokens * self.slots, self.gate_up.size(1)


def arguments(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation_text: str = "silu",
    layout: str = "halves",
    combine: str = "sum",
) -> Arguments:
    """Check the arguments of a call. Raises ArgumentError for shapes, dtypes or options that do not fit."""
    if layout not in LAYOUTS:
        raise ArgumentError("no such layout of experts", found=layout, expected=", ".join(LAYOUTS))
    if combine not in ("sum", "slots"):
        raise ArgumentError("no such way to combine experts", found=combine, expected="sum, slots")
    found = Arguments(
        x, weights, indices, gate_up, down, gate_up_bias, down_bias, activation(activation_text), layout, combine
    )
    for name, tensor, axes in (("x", x, 2), ("weights", weights, 2), ("gate_up", gate_up, 3), ("down", down, 3)):
        if tensor.dim() != axes:
            raise _misfit(f"{name} of moe_ffn has {axes} axes", tensor.shape, _AXES[name])
    _check_shapes(found)
    _check_dtypes(found)
    if layout == "plain" and found.activation.of_both:
        raise _misfit(f"{found.activation.name} is a function of gate and up", "layout='plain'", "a gated layout")
    return found


def read(tensors: Sequence[Tensor | None], options: dict[str, Any]) -> Arguments:
    """``arguments`` of an operator's call: its tensors in order, of which the last may be left out, and its options."""
    x, weights, indices, gate_up, down, *biases = tensors
    assert x is not None
    assert weights is not None
    assert indices is not None
    assert gate_up is not None
    assert down is not None
    return arguments(
        x,
        weights,
        indices,
        gate_up,
        down,
        *biases,
        activation_text=options.get("activation", "silu"),
        layout=options.get("layout", "halves"),
        combine=options.get("combine", "sum"),
    )


_AXES = {
    "x": "(T, d)",
    "weights": "(T, k)",
    "gate_up": "(E, 2F, d), or (E, F, d) with layout='plain'",
    "down": "(E, o, F)",
}


def _check_shapes(a: Arguments) -> None:
    (T, d), (E, rows, _), o = a.x.shape, a.gate_up.shape, a.down.size(1)
    if a.indices.dim() != 2 or a.weights.shape != a.indices.shape or a.indices.size(0) != T:
        found = f"x {tuple(a.x.shape)}, weights {tuple(a.weights.shape)}, indices {tuple(a.indices.shape)}"
        raise _misfit("each token has a weight and an index per slot", found, f"({T}, k) twice")
    if a.gate_up.size(2) != d:
        raise _misfit("gate_up does not fit x", a.gate_up.shape, f"(E, rows, {d})")
    parts = 1 if a.layout == "plain" else 2
    if rows % parts or a.down.size(0) != E or a.down.size(2) != rows // parts:
        found = f"gate_up {tuple(a.gate_up.shape)}, down {tuple(a.down.shape)}"
        expected = f"({E}, o, {rows // parts}): {'half of' if parts == 2 else 'all'} the rows of gate_up"
        raise _misfit(f"down does not fit gate_up in the layout {a.layout!r}", found, expected)
    for name, bias, shape in (("gate_up_bias", a.gate_up_bias, (E, rows)), ("down_bias", a.down_bias, (E, o))):
        if bias is not None and bias.shape != shape:
            raise _misfit(f"{name} does not fit its weight", bias.shape, str(shape))


def _check_dtypes(a: Arguments) -> None:
    dtypes = {t.dtype for t in (a.x, a.gate_up, a.down, a.gate_up_bias, a.down_bias) if t is not None}
    if len(dtypes) > 1 or not a.x.is_floating_point():
        found = ", ".join(sorted(map(str, dtypes)))
        raise _misfit("x and the experts have one dtype, a floating-point one", found, "the same for all")
    if a.indices.dtype != torch.int64 or not a.weights.is_floating_point():
        found = f"indices {a.indices.dtype}, weights {a.weights.dtype}"
        raise _misfit("indices are integers, weights are not", found, "indices torch.int64, weights floating-point")


def _misfit(what: str, found: object, expected: str) -> ArgumentError:
    return ArgumentError(what, found=str(tuple(found) if isinstance(found, torch.Size) else found), expected=expected)
