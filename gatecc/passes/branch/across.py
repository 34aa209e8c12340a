"""Across: an MLP along an axis that counts series, or another fixed number of places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gates.activation import Softmax
from gatecc.ir.program import attribute, shape
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.body import Body
from gatecc.passes.operands import beside, place, static_sizes


@dataclass(frozen=True)
class Across(Body, tag="across"):
    """W_2 gelu(W_1 LN(x)) along an axis, LN over the channels: each series reads the others (TSMixer, 2023).

    ``axis`` is the letter of an axis, as reports print it: in a value (B, series, patches, C), byxc, that of the series
    is y. Its size stays what it is in the transform. ``width`` is that between the layers, 0 for twice the size. W_2
    starts at 0. ``gated`` multiplies the result by C softmax(V h + b) over the channels, which starts at exactly 1.
    """

    axis: Literal["y", "x", "n", "t"] = "y"
    width: int = 0
    gated: bool = True

    def check(self) -> None:
        self.require(self.width >= 0, "width", "a number of units, or 0")

    @property
    def effects(self) -> Effects:
        return Effects(same_for_layers=True, loses_cache=True)

    @property
    def starts_at_zero(self) -> bool:
        return True

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        known = static_sizes(value)
        if self.axis not in value.axes or not value.axes.text.endswith("c") or "c" not in known:
            raise SiteRefusedError(
                "an MLP along an axis needs the axis, and the channels last",
                where=place(site),
                found=f"axes {value.axes}, fixed sizes {known}",
                expected=f"an axis {self.axis}, and c with a fixed size at the end",
                do="name another axis",
            )
        at = value.axes.index(self.axis)
        size = int(shape(value.node)[at])  # the graph holds for this one
        sizes = size, self.width or 2 * size, known["c"], at
        path = edit.module("across", lambda: beside(Along(*sizes, self.gated), edit))
        made = cast("Along", attribute(edit.program.module, path)).up.in_features
        if made != size:
            raise SiteRefusedError(
                "the MLP along the series is for another number of them",
                where=place(site),
                found=f"{size} on axis {self.axis}",
                expected=str(made),
                do="call the model with as many series as it was transformed with",
            )
        return edit.call(path, value.node, name="across")


class Along(nn.Module):
    """The module of `Across`. x: (..., S, ..., C), S at ``axis`` -> the same shape."""

    def __init__(self, size: int, width: int, channels: int, axis: int, gated: bool) -> None:
        super().__init__()
        self.axis, self.norm = axis, nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(size, width), nn.Linear(width, size)
        self.gate = nn.Linear(channels, channels) if gated else None
        for layer in (self.down, *([self.gate] if self.gate is not None else [])):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).movedim(self.axis, -1)
        y = self.down(F.gelu(self.up(y))).movedim(-1, self.axis)
        return y if self.gate is None else y * Softmax(scale="size")(self.gate(y))
