"""What may be given to ``gatecc::short_convolution``, and the sizes that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatecc.errors import ArgumentError

ACTIVATIONS = ("identity", "silu")
TAPS = range(2, 9)  # for which kernels are written
DTYPES = {  # of the kernels of a device type
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


class Arguments(NamedTuple):
    """The arguments of one call, checked. Sizes may be symbolic. x: (B, N, C), weight: (C, 1, K), bias: (C,),
    state: (B, K - 1, C)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    state: Tensor | None
    activation: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the operator."""
        return self[:4]

    @property
    def taps(self) -> int:
        """K."""
        return self.weight.size(2)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(B, K - 1, C)."""
        return self.x.size(0), self.taps - 1, self.x.size(2)


def read(tensors: Sequence[Tensor | None], options: dict[str, Any]) -> Arguments:
    """The arguments of an operator's call: its tensors in order, of which the last may be left out, and its options.

    Raises ArgumentError for shapes, dtypes or options that do not fit.
    """
    x, weight, bias, state = padded(tensors)
    assert x is not None
    assert weight is not None
    found = Arguments(x, weight, bias, state, options.get("activation", "identity"))
    if found.activation not in ACTIVATIONS:
        raise _misfit("no such activation of a short convolution", found.activation, ", ".join(ACTIVATIONS))
    if x.dim() != 3 or weight.dim() != 3 or weight.size(1) != 1 or weight.size(0) != x.size(2) or weight.size(2) == 0:
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise _misfit("a short convolution has taps for each channel", shapes, "x (B, N, C), weight (C, 1, K)")
    if bias is not None and bias.shape != (x.size(2),):
        raise _misfit("the bias of a short convolution is a number per channel", tuple(bias.shape), f"({x.size(2)},)")
    if state is not None and state.shape != found.state_shape:
        shape = str(tuple(found.state_shape))
        raise _misfit("the state of a short convolution is the inputs before the first", tuple(state.shape), shape)
    dtypes = {t.dtype for t in found.tensors if t is not None}
    if len(dtypes) > 1 or not x.is_floating_point():
        expected = "the same for all, a floating-point one"
        raise _misfit("a short convolution has one dtype", ", ".join(sorted(map(str, dtypes))), expected)
    return found


def padded(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """All four, those that were left out as None."""
    return (*tensors, *[None] * (4 - len(tensors)))


def _misfit(what: str, found: object, expected: str) -> ArgumentError:
    return ArgumentError(what, found=str(found), expected=expected)
