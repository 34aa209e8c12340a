"""``gatecc::gated_conv``: schema, fake kernel, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.ops.gated_conv import kernels
from gatecc.ops.gated_conv.arguments import masked, read
from gatecc.ops.transforms import LIBRARY, autocast, below_autograd, has_tangents

_TENSORS = "Tensor x, Tensor weight, Tensor gate, Tensor? bias=None, Tensor? inputs=None"
_OPTIONS = (
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups"
)
LIBRARY.define(f"gated_conv({_TENSORS}, *, {_OPTIONS}) -> Tensor")


def _forward(
    x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None = None, inputs: Tensor | None = None, **options: Any
) -> Tensor:
    return kernels.forward(read(x, weight, gate, bias, inputs, options))


def _fake(
    x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None = None, inputs: Tensor | None = None, **options: Any
) -> Tensor:
    a = read(x, weight, gate, bias, inputs, options)
    return x.new_empty(x.size(0), weight.size(a.rows), *a.space)


def _autograd(keys: Any, *tensors: Any, **options: Any) -> Any:
    """Where a gradient is wanted every channel is computed: a gate that is 0 learns from what it hides."""
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if learns or has_tangents(tensors):
        return masked(*tensors, **options)
    return below_autograd(_OPERATOR, keys, options, *tensors)


def _of_autocast(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """x, kernel and bias in the dtype of convolutions; masks as they are."""
    dtype = torch.get_autocast_dtype(next(x for x in tensors if x is not None).device.type)
    return tuple(
        t if t is None or i in (2, 4) or t.dtype == torch.float64 else t.to(dtype) for i, t in enumerate(tensors)
    )


LIBRARY.impl("gated_conv", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::gated_conv", _fake, lib=LIBRARY)
_OPERATOR = torch.ops.gatecc.gated_conv.default
LIBRARY.impl("gated_conv", _autograd, "Autograd", with_keyset=True)
autocast(_OPERATOR, _of_autocast, masked)


def gated_conv(
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    bias: Tensor | None = None,
    inputs: Tensor | None = None,
    *,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool = False,
    output_padding: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """gate * (weight ∗ x + bias), (B, Cout, *space), computed only where the gate is not 0.

    Args:
        x: (B, Cin, *space) of one to three axes.
        weight: (Cout, Cin / groups, *kernel), transposed (Cin, Cout, *kernel).
        gate: (B or 1, Cout, 1, ...). Channels where it is 0 cost nothing and are exactly 0.
        bias: (Cout,).
        inputs: (B or 1, Cin, 1, ...), 0 only where x is 0: those channels are not read.
        stride, padding, dilation, transposed, output_padding, groups: of the convolution; a number per axis of space.

    On a CPU a kernel in C computes for each sample what is on: in float32, on two axes and one thread.
    Others gather what is on of the weight, for each sample, or for the channels that any sample has on where that
    multiplies less. On a GPU, under torch.func, and where a gradient is wanted it is the formula as it stands.
    Raises ArgumentError for masks of another shape, and for groups of several channels.

    Fire Together Wire Together (CVPR 2022).
    """
    return torch.ops.gatecc.gated_conv(
        x,
        weight,
        gate,
        bias,
        inputs,
        stride=stride,
        padding=padding,
        dilation=dilation,
        transposed=transposed,
        output_padding=[0] * len(stride) if output_padding is None else output_padding,
        groups=groups,
    )
