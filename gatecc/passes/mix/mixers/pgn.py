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

    With ``period`` P h_t has a second part, linear in the same phase of the ``periods`` before: x_(t-P), x_(t-2P), ...
    The series is then read in two dimensions, along its row (the ``window``) and down its column (TPGN).
    """

    site: ClassVar[str] = "rnn"
    stage: ClassVar[Literal["heads", "out"]] = "out"
    masks: ClassVar[tuple[str, ...]] = ("causal",)

    window: int = 16
    period: int = 0
    periods: int = 4

    def check(self) -> None:
        self.require(self.window > 0, "window", "a positive number of tokens")
        self.require(self.period >= 0, "period", "a number of tokens, or 0")
        self.require(self.periods > 0, "periods", "a positive number of periods")

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
        self.layers = nn.ModuleList(PGNLayer(*pair, spec) for pair in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, H)."""
        for layer in self.layers:
            x = layer(x)
        return x


class PGNLayer(nn.Module):
    """One layer: ``history`` extracts what was, ``column`` what was at this phase, ``gate`` chooses what counts."""

    def __init__(self, channels: int, hidden: int, spec: PGN) -> None:
        super().__init__()
        self.history = nn.Conv1d(channels, hidden, spec.window)
        self.period = spec.period
        self.column = nn.Conv1d(channels, hidden, spec.periods, bias=False) if spec.period else None
        self.gate = nn.Linear(channels + hidden, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, H)."""
        h = _past(x, self.history.weight, self.history.bias, 1)
        if self.column is not None:
            h = h + _past(x, self.column.weight, None, self.period)
        z, c = self.gate(torch.cat([x, h], -1)).chunk(2, -1)
        return torch.lerp(torch.tanh(c), h, torch.sigmoid(z))


def _past(x: Tensor, weight: Tensor, bias: Tensor | None, step: int) -> Tensor:
    """Linear in x_(t-W step), ..., x_(t-step), zeros before the first. x: (B, N, C), weight: (H, C, W) -> (B, N, H)."""
    taps = F.pad(weight, (0, 1))  # none for the token itself: a causal convolution, so it can be decoded
    past = F.pad(x.mT, (step * weight.size(-1), 0))
    return F.conv1d(past, taps, bias, dilation=step).mT
