"""Layout: from tensors with named axes to features with the channels last, and from scores back to the value's axes.

Axes are those of gatecc.ir.axes, positions and features. A gate is computed as (*positions, F), F being its features
flattened, and laid out to broadcast against the value only at the end: one view, no copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.axes import Axes


@dataclass(frozen=True)
class SourceShape:
    """Axes of a source tensor ("bnc", "bcyx", "b" for a number per sample) and its channels: its features flattened."""

    axes: Axes
    channels: int

    def __init__(self, axes: Axes | str, channels: int = 1) -> None:
        object.__setattr__(self, "axes", Axes.of(axes))
        object.__setattr__(self, "channels", channels)


@dataclass(frozen=True)
class GateShape:
    """What a gate must know of its place before it can be made.

    ``axes`` of the value to gate; ``sizes`` of its static axes ({"h": 4, "d": 8}; "h" also where the heads lie merged
    in c or g; "e" for a gate over experts; a position such as "n" only if parameters vary over it); ``sources`` one for
    each of ``spec.sources``, in that order.
    """

    axes: Axes
    sizes: Mapping[str, int]
    sources: tuple[SourceShape, ...]

    def __init__(self, axes: Axes | str, sizes: Mapping[str, int], sources: tuple[SourceShape, ...] = ()) -> None:
        object.__setattr__(self, "axes", Axes.of(axes))
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "sources", sources)

    @property
    def positions(self) -> str:
        """The positions of the value."""
        return self.axes.positions.text

    def size(self, letters: str, why: str) -> tuple[int, ...]:
        """Static sizes of axes; raises ArgumentError if the place does not give one."""
        missing = [a for a in letters if a not in self.sizes]
        if missing:
            raise ArgumentError(
                f"the size of axis {missing[0]} is not known here",
                found=f"sizes {dict(self.sizes)} of a value with axes {self.axes}",
                expected=why,
            )
        return tuple(self.sizes[a] for a in letters)


class Features(NamedTuple):
    """``x`` has shape (*at, C): one axis for each letter of ``at``, then the channels."""

    x: Tensor
    at: str


def channels_last(x: Tensor, axes: Axes, sizes: Mapping[str, int]) -> Features:
    """Move the features of x to the end and flatten them: (b, h, n, d) -> (b, n, h*d), (b,) -> (b, 1)."""
    if "g" in axes:
        x = x.unflatten(axes.index("g"), (-1, sizes["h"]))
        axes = axes.apart
    at, channels = axes.positions.text, axes.features.text
    if at + channels != axes.text:
        x = x.permute(axes.order(at + channels))
    if not channels:
        return Features(x.unsqueeze(-1), at)
    return Features(x.flatten(len(at)) if len(channels) > 1 else x, at)


def aligned_positions(source: Axes, target: Axes) -> str:
    """The positions that a source has once it is aligned with a value: its own, or all of the value's."""
    own, all_ = source.positions.text, target.positions.text
    return own if set(own) <= set(all_) else all_


def align(x: Features, shape: GateShape, value: Tensor) -> Features:
    """Bring features to positions that the value has.

    Positions that the value names too stay; a source that counts its places otherwise (rows and columns against tokens,
    tokens flattened into the batch) is viewed with the value's own sizes.
    """
    at = shape.positions
    if set(x.at) <= set(at):
        return x
    sizes = [value.size(shape.axes.index(a)) for a in at[1:]]
    return Features(x.x.reshape(-1, *sizes, x.x.size(-1)), at)


def spread(x: Features, at: str, like: Mapping[str, int]) -> Tensor:
    """Expand features (*x.at, C) to (*at, C); ``like`` gives the sizes of the new positions."""
    have = [a for a in at if a in x.at]
    y = x.x.permute(*[x.at.index(a) for a in have], -1)
    for i, a in enumerate(at):
        if a not in x.at:
            y = y.unsqueeze(i)
    return y.expand(*[like[a] if a not in x.at else -1 for a in at], -1)


def emit(gate: Features, letters: str, shape: GateShape, value: Tensor) -> Tensor:
    """Lay a gate (*at, F) out so that it broadcasts against the value.

    ``letters`` are the features that F flattens. Heads that the value holds merged (in c or g) are expanded. A gate
    over experts has the axes of the value with its features replaced by e.
    """
    split = shape.size(letters, "the sizes of the gated axes")
    x = gate.x.unflatten(-1, split) if len(letters) > 1 else gate.x if letters else gate.x.squeeze(-1)
    have = gate.at + letters
    if letters == "e":
        return _broadcast(x, have, shape.positions + "e")
    if "h" in have and shape.sizes["h"] == 1 and not set("hcg") & set(shape.axes):
        x, have = x.squeeze(have.index("h")), have.replace("h", "")  # a head by itself has no axis for its number
    if "g" in shape.axes:
        return _merge_batch(x, have, shape, value)
    if "h" in have and "h" not in shape.axes:
        return _merge_channels(x, have, shape)
    return _broadcast(x, have, shape.axes.text)


def _broadcast(x: Tensor, have: str, want: str) -> Tensor:
    """Permute to the order of ``want``, with size 1 for the axes that x lacks."""
    order = [have.index(a) for a in want if a in have]
    y = x if order == sorted(order) else x.permute(order)
    for i, a in enumerate(want):
        if a not in have:
            y = y.unsqueeze(i)
    return y


def _merge_channels(x: Tensor, have: str, shape: GateShape) -> Tensor:
    """One gate per head, the value's channels being heads times their width: (..., h) -> (..., h*d)."""
    heads, (channels,) = shape.sizes["h"], shape.size("c", "the width of the value")
    y = _broadcast(x, have, shape.axes.renamed("c", "h").text).unsqueeze(at := shape.axes.index("c") + 1)
    width = [-1] * y.dim()
    width[at] = channels // heads
    return y.expand(width).flatten(at - 1, at)


def _merge_batch(x: Tensor, have: str, shape: GateShape, value: Tensor) -> Tensor:
    """The value's first axis is b*h: expand what the gate lacks of the two, then merge them."""
    y = _broadcast(x, have, shape.axes.apart.text)
    if "b" not in have and "h" not in have:
        return y.squeeze(0)
    heads = shape.sizes["h"]
    size = [-1] * y.dim()
    size[0] = -1 if "b" in have else value.size(0) // heads
    size[1] = heads
    return y.expand(size).flatten(0, 1)


def width(letters: str, shape: GateShape) -> int:
    """F: the number of scores at a position."""
    return prod(shape.size(letters, "the sizes of the gated axes"))
