"""PGN: the parallel gated network, in the place of a recurrent layer: what was is read from a window, not a state."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.passes.mix.mixers.base import Mixer, MixerModule, Place


@dataclass(frozen=True)
class PGN(Mixer, tag="pgn"):
    """h_t = A [x_(t-W) .. x_(t-1)] + a, [z, c] = G [x_t; h_t] + b, out = sigmoid(z) h + (1 - sigmoid(z)) tanh(c).

    A reads ``window`` tokens before the present one, zeros before the first (Jia et al. 2024, PGN: The RNN's New
    Successor is Effective for Long-Range Time Series Forecasting). No step waits for another. Layers of a stack follow
    each other. The sizes of input and output are those of the layer that it replaces.
    """

    site: ClassVar[str] = "rnn"
    stage: ClassVar[Literal["heads", "out"]] = "out"
    masks: ClassVar[tuple[str, ...]] = ("causal",)

    window: int = 16

    def check(self) -> None:
        self.require(self.window > 0, "window", "a positive number of tokens")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("in",)

    def module(self, place: Place) -> MixerModule:
        return PGNMixer(self, place)


class PGNMixer(MixerModule):
    """The module of `PGN`."""

    tag = PGN.tag

    def __init__(self, spec: PGN, place: Place) -> None:
        super().__init__()
        self.spec, self.place = spec, place
        sizes = [place.dim, *[place.value] * place.layers]
        self.layers = nn.ModuleList(PGNLayer(*pair, spec.window) for pair in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, H)."""
        for layer in self.layers:
            x = layer(x)
        return x


class PGNLayer(nn.Module):
    """One layer: ``history`` extracts what was, ``gate`` chooses between it and the present."""

    def __init__(self, channels: int, hidden: int, window: int) -> None:
        super().__init__()
        self.history = nn.Conv1d(channels, hidden, window)
        self.gate = nn.Linear(channels + hidden, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, H)."""
        taps = F.pad(
            self.history.weight, (0, 1)
        )  # none for the token itself: a causal convolution, so it can be decoded
        past = F.pad(x.mT, (taps.size(-1) - 1, 0))
        h = F.conv1d(past, taps, self.history.bias).mT
        z, c = self.gate(torch.cat([x, h], -1)).chunk(2, -1)
        return torch.lerp(torch.tanh(c), h, torch.sigmoid(z))
