"""``gatecc::group_linear``: a dense product between groups of units, of which some pairs are masked.

    y_g = sum over h with mask[g, h] of W[g, h] x_h (+ bias_g),    W cut into blocks of equal size

What is masked is not computed: each run of kept blocks in a row is one product on a slice of x, so nothing is gathered
or copied. Where a gradient is wanted, and on other devices than a CPU, it is the dense product with a masked weight,
whose gradient is 0 where the mask is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.ops.paths import Taken
from gatecc.ops.registry import Operator, StepRule, register
from gatecc.ops.transforms import LIBRARY, UNDER_FUNC, below_autograd, has_tangents

_SMALL = 1 << 14  # multiply-adds of a block's product below which its call costs more than it saves

LIBRARY.define("group_linear(Tensor x, Tensor weight, Tensor mask, Tensor? bias=None) -> Tensor")


def expanded(mask: Tensor, weight: Tensor) -> Tensor:
    """The mask (G, H) of the blocks as one of the elements of weight (O, I)."""
    (G, H), (O, I) = mask.shape, weight.shape  # noqa: E741
    return mask[:, None, :, None].expand(G, O // G, H, I // H).reshape(O, I)


def masked(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by operators of torch, which have derivatives: every block, times the mask."""
    return F.linear(x, weight * expanded(mask, weight), bias)


def _forward(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.device.type != "cpu":
        return masked(x, weight, mask, bias)
    kept: list[list[bool]] = mask.tolist()
    if all(map(all, kept)):
        return F.linear(x, weight, bias)
    (G, H), (O, I) = mask.shape, weight.shape  # noqa: E741
    rows = x.reshape(-1, I)
    if rows.size(0) * (O // G) * (I // H) < _SMALL:
        return masked(x, weight, mask, bias)
    out = rows.new_empty(rows.size(0), O)
    for g, blocks in enumerate(kept):
        own = slice(g * (O // G), (g + 1) * (O // G))
        y, first = out[:, own], True
        for start, end in _runs(blocks):
            part = slice(start * (I // H), end * (I // H))
            a, b = rows[:, part], weight[own, part].T
            if first:
                torch.mm(a, b, out=y) if bias is None else torch.addmm(bias[own], a, b, out=y)
            else:
                torch.addmm(y, a, b, out=y)
            first = False
        if first:
            y.zero_() if bias is None else y.copy_(bias[own])
    return out.view(*x.shape[:-1], O)


def _runs(blocks: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Start and end of each run of kept blocks."""
    at = 0
    for keep, run in groupby(blocks):
        length = len(list(run))
        if keep:
            yield at, at + length
        at += length


def _fake(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.size(0))


def _autograd(keys: Any, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    given = [t for t in (x, weight, bias) if t is not None]
    if has_tangents(given) or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return masked(x, weight, mask, bias)
    result: Tensor = below_autograd(_OPERATOR, keys, {}, x, weight, mask, bias)
    return result


def _autocast(*tensors: Tensor | None) -> Tensor:
    """x, weight and bias are cast as those of a linear layer are."""
    x, weight, mask, *bias = tensors
    assert x is not None
    dtype = torch.get_autocast_dtype(x.device.type)
    cast = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, *bias)]
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return _OPERATOR(cast[0], cast[1], mask, *cast[2:])


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _flops(x: Any, weight: Any, mask: Any, *_: Any, slots: int | None = None) -> int:
    blocks = prod(x[:-1]) * mask[0] * mask[1] if slots is None else slots
    return 2 * blocks * (weight[0] // mask[0]) * (weight[1] // mask[1])


def _known(mask: Tensor) -> bool:
    return mask.device.type != "meta" and not isinstance(mask, FakeTensor)


def _served(x: Tensor, weight: Tensor, mask: Tensor, *_: Any) -> tuple[tuple[Tensor, ...], int, int]:
    rows = x.numel() // max(x.size(-1), 1)
    kept = int(mask.sum()) if _known(mask) else mask.numel()
    return (weight,), rows * kept, rows * mask.numel()


def _taken(x: Tensor, weight: Tensor, mask: Tensor, *_: Any, out: Tensor) -> Taken | None:
    return Taken("group", mask.long().flatten().tolist(), 1, (weight,)) if _known(mask) else None


def _moved(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> int:
    share = float(mask.float().mean()) if _known(mask) and mask.numel() else 1.0
    out = x.numel() // max(x.size(-1), 1) * weight.size(0)
    return (x.numel() + out + round(weight.numel() * share)) * x.element_size() + mask.numel()


LIBRARY.impl("group_linear", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::group_linear", _fake, lib=LIBRARY)
_OPERATOR = torch.ops.gatecc.group_linear.default
LIBRARY.impl("group_linear", _autograd, "Autograd", with_keyset=True)
LIBRARY.impl("group_linear", masked, UNDER_FUNC)
for _key in ("AutocastCPU", "AutocastCUDA"):
    LIBRARY.impl("group_linear", _autocast, _key)
register(
    Operator(
        overload=_OPERATOR,
        step=StepRule(operand="x", axis=None),  # each token by itself
        onnx={"portable": Lowering(masked)},
        flops=_flops,
        bytes=_moved,
        served=_served,
        taken=_taken,
        masked=masked,
    )
)
