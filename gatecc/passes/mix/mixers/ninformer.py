"""NiNformer: an MLP-Mixer, whose weights belong to tokens, multiplied by a linear map of the same input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from gatecc.passes.mix.mixers.base import Mixer, MixerModule, Place


@dataclass(frozen=True)
class NiNformer(Mixer, tag="ninformer"):
    """(W x + b) * mixer(x); nothing squashes the gate (Abdullah and Shen 2024, NiNformer).

    The mixer is that of MLP-Mixer: x <- x + MLP over tokens (LN(x)), then x <- x + MLP over channels (LN(x)), with
    ``hidden`` features inside both, 4 times the channels if that is 0. Its weights hold for one number of tokens.
    """

    stage: ClassVar[Literal["heads", "out"]] = "out"
    fixed_length: ClassVar[bool] = True
    masks: ClassVar[tuple[str, ...]] = ("bidirectional",)
    pads: ClassVar[bool] = False

    hidden: int = 0

    def check(self) -> None:
        self.require(self.hidden >= 0, "hidden", "a number of features, or 0")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("hidden",)

    def module(self, place: Place) -> MixerModule:
        return NiNformerMixer(self, place)


class NiNformerMixer(MixerModule):
    """The module of `NiNformer`."""

    tag = NiNformer.tag

    def __init__(self, spec: NiNformer, place: Place) -> None:
        super().__init__()
        self.place = place
        width = spec.hidden or 4 * place.dim
        self.gate = nn.Linear(place.dim, place.dim)
        self.token_norm = nn.LayerNorm(place.dim)
        self.tokens = mlp(place.tokens or 0, width)
        self.channel_norm = nn.LayerNorm(place.dim)
        self.channels = mlp(place.dim, width)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden: (B, N, C) -> out (B, N, C)."""
        del mask
        mixed = hidden + self.tokens(self.token_norm(hidden).mT).mT
        mixed = mixed + self.channels(self.channel_norm(mixed))
        return self.gate(hidden) * mixed


def mlp(size: int, hidden: int) -> nn.Sequential:
    """Two linears with a GELU between them, over the last axis."""
    return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))
