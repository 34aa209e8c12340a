"""``gatecc::gated_conv`` in ATen: rows and columns of the weight that are on, gathered, and a plain convolution.

Samples have masks of their own. A batch runs as one convolution with the channels that any of its samples has on, or
sample by sample, whichever multiplies less.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gatecc.ops.gated_conv.arguments import Arguments, convolve

_START = 400_000  # multiplications in the time that one more gathered convolution takes to start (measured: 40 µs)


class Part(NamedTuple):
    """One convolution: of which samples, with which output and input channels (None: all)."""

    samples: slice
    rows: Tensor
    columns: Tensor | None

    def pairs(self, a: Arguments) -> int:
        """Pairs of channels that it multiplies, over its samples."""
        columns = a.weight.size(1 - a.rows) if self.columns is None else self.columns.numel()
        return (self.samples.stop - self.samples.start) * self.rows.numel() * columns


def forward(a: Arguments) -> Tensor:
    """(B, Cout, *space), contiguous: the channels that are on times their gates, 0 elsewhere."""
    made = [_compute(a, part) for part in parts(a)]
    return made[0] if len(made) == 1 else torch.cat(made)


def parts(a: Arguments) -> list[Part]:
    """The convolutions of a call."""
    B = a.x.size(0)
    on = a.gate.flatten(1) != 0
    given = None if a.inputs is None or a.depthwise else a.inputs.flatten(1) != 0
    whole = Part(slice(0, B), _any(on), None if given is None else _any(given))
    if B == 1 or (on.size(0) == 1 and (given is None or given.size(0) == 1)):
        return [whole]
    columns = a.weight.size(1 - a.rows) if given is None else given.sum(1)
    alone = int((on.sum(1) * columns).expand(B).sum()) * a.places + (B - 1) * _START
    if alone >= whole.pairs(a) * a.places:
        return [whole]
    return apart(a)


def apart(a: Arguments) -> list[Part]:
    """A convolution for each sample."""
    B = a.x.size(0)
    rows = (a.gate.flatten(1) != 0).expand(B, -1).unbind()
    given = None if a.inputs is None or a.depthwise else (a.inputs.flatten(1) != 0).expand(B, -1).unbind()
    return [Part(slice(i, i + 1), _places(o), None if given is None else _places(given[i])) for i, o in enumerate(rows)]


def _compute(a: Arguments, part: Part) -> Tensor:
    x, options, space = a.x[part.samples], a.options, a.space
    out = x.new_zeros(x.size(0), a.weight.size(a.rows), *space)
    if not part.rows.numel():
        return out
    weight = a.weight.index_select(a.rows, part.rows)
    bias = None if a.bias is None else a.bias.index_select(0, part.rows)
    if a.depthwise:
        per_input = a.weight.size(0) // a.x.size(1)
        x, options = x.index_select(1, part.rows // per_input), {**options, "groups": part.rows.numel()}
    elif part.columns is not None and part.columns.numel() < a.x.size(1):
        x, weight = x.index_select(1, part.columns), weight.index_select(1 - a.rows, part.columns)
    if weight.numel():
        y = convolve(x, weight, bias, options)
    else:  # no input is on: the bias is all there is
        y = x.new_zeros(x.size(0), part.rows.numel(), *space)
        y = y if bias is None else y + bias.view(-1, *[1] * len(space))
    gate = (a.gate if a.gate.size(0) == 1 else a.gate[part.samples]).index_select(1, part.rows)
    return out.index_copy_(1, part.rows, y * gate.to(y.dtype))


def _any(on: Tensor) -> Tensor:
    return _places(on[0] if on.size(0) == 1 else on.any(0))


def _places(on: Tensor) -> Tensor:
    return on.nonzero().squeeze(1)
