"""Mixers of spiking transformers: attention without a softmax, and depthwise convolutions over a grid of tokens.

They hold ReLUs where neurons belong: a loop over steps (`gatecc.passes.loop`, carry "spikes") puts these there.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.passes.branch.grid import GridConv, GridConvolution
from gatecc.passes.mix.mixers.base import Mixer, MixerModule, Place
from gatecc.passes.mix.mixers.linear import everything


@dataclass(frozen=True)
class SpikingAttention(Mixer, tag="spiking_attention"):
    """s(scale s(q) (s(k)^T s(v))): every token reads the sum of all, without a softmax (Spikformer, 2023).

    s is a ReLU, a neuron inside a loop; ``scale`` 0 is that of the attention that it replaces.
    """

    masks: ClassVar[tuple[str, ...]] = ("bidirectional",)

    scale: float = 0.0

    def check(self) -> None:
        self.require(self.scale >= 0, "scale", "a positive number, or 0")

    def module(self, place: Place) -> MixerModule:
        return SpikingMixer(self, place)


class SpikingMixer(MixerModule):
    """The module of `SpikingAttention`."""

    tag = SpikingAttention.tag

    def __init__(self, spec: SpikingAttention, place: Place) -> None:
        super().__init__()
        self.spec, self.place = spec, place

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q: (B, H, N, D), k and v: (B, Hk, N, D) -> heads (B, H, N, Dv)."""
        scale = self.spec.scale or self.place.scale
        return F.relu(everything(F.relu(q), F.relu(k), F.relu(v), scale, False, mask))


@dataclass(frozen=True)
class SpikingConv(Mixer, tag="spiking_conv"):
    """A depthwise convolution of s(x) with a ``kernel`` by ``kernel`` window over a grid of tokens (Max-Former, 2025).

    It takes the place of the projections, too. s is a ReLU, a neuron inside a loop. The first ``prefix`` tokens, such
    as a class token, are not in the grid and get 0; the others are ``rows`` by ``columns``, a square where these are 0.
    """

    stage: ClassVar[Literal["heads", "out"]] = "out"
    fixed_length: ClassVar[bool] = True  # the grid is of one size
    masks: ClassVar[tuple[str, ...]] = ("bidirectional",)
    pads: ClassVar[bool] = False

    kernel: int = 3
    prefix: int = 0
    rows: int = 0
    columns: int = 0

    def check(self) -> None:
        GridConv(self.kernel, prefix=self.prefix, rows=self.rows, columns=self.columns)

    @property
    def reads(self) -> tuple[str, ...]:
        return ("hidden",)

    def module(self, place: Place) -> MixerModule:
        return SpikingConvMixer(self, place)


class SpikingConvMixer(MixerModule):
    """The module of `SpikingConv`."""

    tag = SpikingConv.tag

    def __init__(self, spec: SpikingConv, place: Place) -> None:
        super().__init__()
        self.spec, self.place = spec, place
        count = (place.tokens or 0) - spec.prefix
        side = isqrt(max(count, 0))
        self.cells = (spec.rows, spec.columns) if spec.rows else (side, side)
        if count < 1 or self.cells[0] * self.cells[1] != count:
            raise ArgumentError(
                "the tokens do not fill the grid",
                found=f"{place.tokens} tokens, {spec.prefix} of them before the grid",
                expected=f"{spec.rows} rows of {spec.columns}" if spec.rows else "a square",
                do="set prefix (a class token is 1), and rows and columns where the grid is no square",
            )
        self.grid = GridConvolution(GridConv(spec.kernel, prefix=spec.prefix), place.dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (B, N, C) -> (B, N, C)."""
        return self.grid(F.relu(hidden), *self.cells)
