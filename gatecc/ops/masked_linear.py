"""``gatecc::masked_linear``: a dense product whose input and output channels each sample has on or off.

    y = outputs * (W (inputs * x) + b),    masks of a sample: the same for all of its tokens

Channels whose mask is 0 are not read and not computed: samples of one pair of masks, those of one task, are one product
of the rows and columns that are on, unless they have few tokens. Where a gradient is wanted, and on other devices than
a CPU, it is the formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.errors import ArgumentError
from gatecc.ops.paths import Taken
from gatecc.ops.registry import Operator, register
from gatecc.ops.transforms import LIBRARY, autocast, below_autograd, has_tangents

LIBRARY.define(
    "masked_linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? inputs=None, Tensor? outputs=None) -> Tensor"
)
Mask = Tensor | None
_TOKENS = 32  # fewer are multiplied by the whole matrix: to gather a part of it takes as long (measured: 20 to 40)


class Part(NamedTuple):
    """Samples of one pair of masks: their places (None: all), and the channels that are on (None: all)."""

    samples: Tensor | None
    columns: Tensor | None
    rows: Tensor | None


def masked(x: Tensor, weight: Tensor, bias: Mask = None, inputs: Mask = None, outputs: Mask = None) -> Tensor:
    """The same by operators of torch, which have derivatives: every channel, times the masks."""
    y = F.linear(x if inputs is None else x * _over(inputs, x), weight, bias)
    return y if outputs is None else y * _over(outputs, y)


def _over(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (B, C) beside x (B, ..., C)."""
    return mask.reshape(mask.size(0), *[1] * (x.dim() - 2), mask.size(1)).to(x.dtype)


def _forward(x: Tensor, weight: Tensor, bias: Mask = None, inputs: Mask = None, outputs: Mask = None) -> Tensor:
    _check(x, weight, inputs, outputs)
    if x.device.type != "cpu":  # reading a mask would wait for the device
        return masked(x, weight, bias, inputs, outputs)
    found = list(parts(x, inputs, outputs))
    if len(found) == 1:
        return _part(x, weight, bias, inputs, outputs, found[0])
    y = x.new_empty(*x.shape[:-1], weight.size(0))
    for part in found:
        at = cast("Tensor", part.samples)
        some = [m if m is None or m.size(0) == 1 else m.index_select(0, at) for m in (inputs, outputs)]
        y.index_copy_(0, at, _part(x.index_select(0, at), weight, bias, some[0], some[1], part))
    return y


def parts(x: Tensor, inputs: Mask, outputs: Mask) -> Iterator[Part]:
    """The products of a call: one for each pair of masks among its samples."""
    masks = [m for m in (inputs, outputs) if m is not None]
    on = torch.cat([(m != 0).expand(x.size(0), -1) for m in masks], 1) if masks else None
    tokens = prod(x.shape[1:-1])
    if on is None or x.size(0) * tokens < _TOKENS:
        yield Part(None, None, None)
    elif all(m.size(0) == 1 for m in masks) or bool((on == on[:1]).all()):
        yield Part(None, *_channels(on[0], inputs, outputs))
    else:
        kinds, kind = torch.unique(on, dim=0, return_inverse=True)
        for i, row in enumerate(kinds):
            samples = (kind == i).nonzero().squeeze(1)
            few = samples.numel() * tokens < _TOKENS
            yield Part(samples, *((None, None) if few else _channels(row, inputs, outputs)))


def _channels(on: Tensor, inputs: Mask, outputs: Mask) -> tuple[Tensor | None, Tensor | None]:
    cut = 0 if inputs is None else inputs.size(1)
    return None if inputs is None else _some(on[:cut]), None if outputs is None else _some(on[cut:])


def _some(on: Tensor) -> Tensor | None:
    return None if bool(on.all()) else on.nonzero().squeeze(1)


def _part(x: Tensor, weight: Tensor, bias: Mask, inputs: Mask, outputs: Mask, part: Part) -> Tensor:
    _, columns, rows = part
    if columns is None and rows is None:
        return masked(x, weight, bias, inputs, outputs)
    full, tokens = (*x.shape[:-1], weight.size(0)), prod(x.shape[:-1])
    if rows is not None:
        weight = weight.index_select(0, rows)
        bias = None if bias is None else bias.index_select(0, rows)
        outputs = None if outputs is None else outputs.index_select(1, rows)
    if columns is not None:
        flat = x.reshape(tokens, x.size(-1)).index_select(1, columns)  # on two axes: several times as fast
        x, weight = flat.view(*x.shape[:-1], columns.numel()), weight.index_select(1, columns)
        inputs = None if inputs is None else inputs.index_select(1, columns)
    y = masked(x, weight, bias, inputs, outputs)
    if rows is None:
        return y
    flat = y.reshape(tokens, rows.numel())
    return y.new_zeros(tokens, full[-1]).scatter_(1, rows.expand(tokens, -1), flat).view(full)


def _check(x: Tensor, weight: Tensor, inputs: Mask, outputs: Mask) -> None:
    for name, mask, width in (("inputs", inputs, weight.size(1)), ("outputs", outputs, weight.size(0))):
        if mask is not None and (mask.dim() != 2 or mask.size(1) != width or mask.size(0) not in (1, x.size(0))):
            raise ArgumentError(
                f"{name} is a number per sample and channel",
                found=f"{tuple(mask.shape)} for x {tuple(x.shape)}, weight {tuple(weight.shape)}",
                expected=f"(B, {width}), or one row for all samples",
            )


def _fake(x: Tensor, weight: Tensor, bias: Mask = None, inputs: Mask = None, outputs: Mask = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.size(0))


def _autograd(keys: Any, *tensors: Any) -> Tensor:
    """Where a gradient is wanted every channel is computed: a mask that is 0 learns from what it hides."""
    given = [t for t in tensors if t is not None]
    if has_tangents(given) or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return masked(*tensors)
    result: Tensor = below_autograd(_OPERATOR, keys, {}, *tensors)
    return result


def _of_autocast(tensors: tuple[Mask, ...]) -> tuple[Mask, ...]:
    """x, weight and bias in the dtype of linear layers; masks as they are."""
    dtype = torch.get_autocast_dtype(next(x for x in tensors if x is not None).device.type)
    return tuple(t if t is None or i > 2 or t.dtype == torch.float64 else t.to(dtype) for i, t in enumerate(tensors))


def _flops(x: Any, weight: Any, *_: Any, slots: int | None = None) -> int:
    """Two operations for each pair of channels of a token; from shapes alone every channel counts as on."""
    return 2 * (prod(x[:-1]) * prod(weight) if slots is None else slots)


def _known(*masks: Mask) -> bool:
    return all(m is None or (m.device.type != "meta" and not isinstance(m, FakeTensor)) for m in masks)


def _served(
    x: Tensor, weight: Tensor, bias: Mask = None, inputs: Mask = None, outputs: Mask = None
) -> tuple[tuple[Tensor, ...], int, int]:
    tokens, every = prod(x.shape[1:-1]), x.size(0) * weight.numel()
    if not _known(inputs, outputs) or x.device.type != "cpu":
        return (weight,), tokens * every, tokens * every
    pairs = 0
    for samples, columns, rows in parts(x, inputs, outputs):
        sizes = (weight.size(i) if at is None else at.numel() for i, at in ((1, columns), (0, rows)))
        pairs += (x.size(0) if samples is None else samples.numel()) * prod(sizes)
    return (weight,), tokens * pairs, tokens * every


def _taken(
    x: Tensor, weight: Tensor, bias: Mask = None, inputs: Mask = None, outputs: Mask = None, *, out: Tensor
) -> Taken | None:
    """For how many samples each output channel is on."""
    if outputs is None or not _known(outputs):
        return None
    return Taken("channel", (outputs != 0).expand(x.size(0), -1).sum(0).tolist(), x.size(0), (weight,))


LIBRARY.impl("masked_linear", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::masked_linear", _fake, lib=LIBRARY)
_OPERATOR = torch.ops.gatecc.masked_linear.default
LIBRARY.impl("masked_linear", _autograd, "Autograd", with_keyset=True)
autocast(_OPERATOR, _of_autocast, masked)
register(
    Operator(
        overload=_OPERATOR,
        onnx={"portable": Lowering(masked)},
        flops=_flops,
        served=_served,
        taken=_taken,
        masked=masked,
    )
)
