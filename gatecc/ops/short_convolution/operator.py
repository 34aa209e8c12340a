"""``gatecc::short_convolution``: y_t = act(bias + sum_j weight_j x_(t-K+1+j)), each channel by itself, zeros before x.

x: (B, N, C), tokens first, as projections leave it and what follows reads it; weight: (C, 1, K), as conv1d holds it;
bias: (C,) -> y: (B, N, C), contiguous. On a CPU torch transposes to channels first, where Inductor computes a tap at a
time through gathered weights. Of Mamba (Gu and Dao 2023), gated delta nets, LFM2 and the like.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.ops.registry import Operator, register
from gatecc.ops.short_convolution.c.kernels import DTYPES, forward
from gatecc.ops.transforms import LIBRARY, UNDER_FUNC, below_autograd, has_tangents

TAPS = range(2, 9)  # for which the kernel is written

LIBRARY.define('short_convolution(Tensor x, Tensor weight, Tensor? bias=None, str activation="identity") -> Tensor')


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    plain = all(t.device.type == "cpu" and t.dtype == x.dtype for t in (x, weight, bias) if t is not None)
    if plain and x.numel() and weight.size(2) in TAPS:
        y = forward(x, weight, bias, activation == "silu")
        if y is not None:
            return y
    return _in_aten(x, weight, bias, activation)


def _in_aten(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    """The same by operators of torch, which have derivatives."""
    if x.size(1) == 0:  # conv1d asks for a token
        return x.contiguous()
    before = weight.size(2) - 1
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=before, groups=weight.size(0))
    y = y[:, :, : x.size(1)].transpose(1, 2).contiguous()
    return F.silu(y) if activation == "silu" else y


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    return x.new_empty(x.shape)


def _autograd(keys: Any, *tensors: Any, **options: Any) -> Tensor:
    given = [x for x in tensors if isinstance(x, Tensor)]
    if has_tangents(given) or (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        return _in_aten(*tensors, **options)
    result: Tensor = below_autograd(_OPERATOR, keys, options, *tensors)
    return result


def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0] * weight[2]


LIBRARY.impl("short_convolution", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::short_convolution", _fake, lib=LIBRARY)
_OPERATOR = torch.ops.gatecc.short_convolution.default
LIBRARY.impl("short_convolution", _autograd, "Autograd", with_keyset=True)
LIBRARY.impl("short_convolution", _in_aten, UNDER_FUNC)
register(Operator(overload=_OPERATOR, flops=_flops))

__all__ = ["DTYPES", "TAPS"]
