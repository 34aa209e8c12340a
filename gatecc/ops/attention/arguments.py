"""What may be given to ``gatecc::attention``, and the sizes that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gatecc.errors import ArgumentError

GateActivation = Literal["identity", "sigmoid", "silu"]
GATE_ACTIVATIONS: tuple[GateActivation, ...] = get_args(GateActivation)
TENSORS = 6  # of the operator's arguments, all of them differentiable


class Arguments(NamedTuple):
    """The arguments of one call, checked. Sizes may be symbolic.

    q: (B, H, N, D), k: (B, G, S, D), v: (B, G, S, E), gate: (B, H, N, E or 1), bias: four axes that broadcast to
    (B, H, N, S), sinks: (H,). Query i stands at the place S - N + i of the keys. blocks: (B or 1, H or 1, rows,
    columns), as many rows and columns as blocks of these sizes cover N and S.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    gate_activation: GateActivation
    blocks: Tensor | None = None
    block_sizes: tuple[int, int] = (64, 64)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the operator's order."""
        return self[:TENSORS]

    @property
    def group(self) -> int:
        """How many heads of queries share one of keys and values."""
        return self.q.size(1) // self.k.size(1)

    @property
    def wide(self) -> torch.dtype:
        """In which scores are summed: float32; float64 for float64."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def new_output(self) -> Tensor:
        """Room for the result, (B, H, N, E): the heads of a token lie together, so that joining them is a view."""
        (B, H, N, _), E = self.q.shape, self.v.size(3)
        return self.q.new_empty(B, N, H, E).transpose(1, 2)

    def new_logsumexp(self) -> Tensor:
        """Room for the logarithms of the sums, (B, H, N)."""
        return self.q.new_empty(self.q.shape[:3], dtype=self.wide)


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    gate_activation: str = "identity",
    blocks: Tensor | None = None,
    block_sizes: Sequence[int] = (64, 64),
) -> Arguments:
    """Check the arguments of a call. Raises ArgumentError for shapes, dtypes or options that do not fit."""
    for name, tensor in (("q", q), ("k", k), ("v", v), ("gate", gate), ("bias", bias)):
        if tensor is not None and tensor.dim() != 4:
            raise _misfit(f"{name} of attention has four axes", tensor.shape, "batch, heads, tokens, features")
    if gate_activation not in GATE_ACTIVATIONS:
        raise _misfit("no such activation of attention's gate", gate_activation, ", ".join(GATE_ACTIVATIONS))
    if window is not None and window < 1:
        raise _misfit("a window of attention holds a key at least", window, "1 or more, or None")
    if softcap is not None and not softcap > 0:
        raise _misfit("scores are capped at a positive number", softcap, "more than 0, or None")
    _check_shapes(q, k, v, gate, bias, sinks)
    _check_dtypes(q, k, v, gate, bias, sinks)
    sizes = _checked_blocks(blocks, block_sizes, (*q.shape[:3], k.size(2)))
    factor = q.size(3) ** -0.5 if scale is None else scale
    return Arguments(q, k, v, gate, bias, sinks, factor, causal, window, softcap, gate_activation, blocks, sizes)


def read(tensors: Sequence[Tensor | None], options: dict[str, Any]) -> Arguments:
    """``arguments`` of an operator's call: its tensors in order, of which the last may be left out, and its options."""
    q, k, v, *rest = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    return arguments(q, k, v, *rest, **options)


def padded(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """All of the operator's tensors, those that were left out as None."""
    return (*tensors, *[None] * (TENSORS - len(tensors)))


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> None:
    (B, H, N, D), (_, G, S, _), E = q.shape, k.shape, v.size(3)
    if k.size(0) != B or k.size(3) != D or v.shape[:3] != k.shape[:3] or H % max(G, 1):
        found = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise _misfit("queries, keys and values do not fit", found, "(B, H, N, D), (B, G, S, D), (B, G, S, E), G | H")
    if gate is not None and (gate.shape[:3] != q.shape[:3] or gate.size(3) not in (1, E)):
        raise _misfit("the gate does not fit the result", gate.shape, f"({B}, {H}, {N}, {E} or 1)")
    if bias is not None and any(size not in (1, full) for size, full in zip(bias.shape, (B, H, N, S), strict=True)):
        raise _misfit("the bias does not fit the scores", bias.shape, f"({B}, {H}, {N}, {S}), or 1 in their place")
    if sinks is not None and sinks.shape != (H,):
        raise _misfit("there is one sink for each head", sinks.shape, f"({H},)")


def _checked_blocks(blocks: Tensor | None, sizes: Sequence[int], full: tuple[int, ...]) -> tuple[int, int]:
    """How many queries and keys a block has. ``full``: batch, heads, queries, keys."""
    if len(sizes) != 2 or min(sizes) < 1:
        raise _misfit("blocks of attention have so many queries and so many keys", list(sizes), "two positive numbers")
    queries, keys = sizes
    if blocks is not None:
        B, H, N, S = full
        rows, columns = (N + queries - 1) // queries, (S + keys - 1) // keys
        if blocks.dim() != 4 or tuple(blocks.shape[2:]) != (rows, columns) or blocks.dtype != torch.bool:
            expected = f"booleans, ({B} or 1, {H} or 1, {rows}, {columns})"
            raise _misfit("the map of blocks does not fit", f"{blocks.dtype} {tuple(blocks.shape)}", expected)
        if blocks.size(0) not in (1, B) or blocks.size(1) not in (1, H):
            raise _misfit("the map of blocks does not fit", blocks.shape, f"({B} or 1, {H} or 1, {rows}, {columns})")
    return queries, keys


def _check_dtypes(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> None:
    dtypes = {t.dtype for t in (q, k, v)}
    if len(dtypes) > 1 or not q.is_floating_point():
        found = ", ".join(sorted(map(str, dtypes)))
        raise _misfit("queries, keys and values have one dtype, a floating-point one", found, "the same for all")
    for name, tensor in (("gate", gate), ("bias", bias), ("sinks", sinks)):
        seen = name == "bias" and tensor is not None and tensor.dtype == torch.bool
        if tensor is not None and not tensor.is_floating_point() and not seen:
            raise _misfit(f"the {name} of attention holds numbers", tensor.dtype, "a floating-point dtype")


def _misfit(what: str, found: object, expected: str) -> ArgumentError:
    return ArgumentError(what, found=str(tuple(found) if isinstance(found, torch.Size) else found), expected=expected)
