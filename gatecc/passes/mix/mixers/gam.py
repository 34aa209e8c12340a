"""GAM: a causal convolution and a memory that is the same for all tokens, joined by two gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gatecc.passes.mix.mixers.base import Mixer, MixerModule, Place
from gatecc.passes.mix.mixers.packed import causal_convolution, kept


@dataclass(frozen=True)
class GAM(Mixer, tag="gam"):
    """sigmoid(a) * conv(x) + sigmoid(b) * softmax(x M^T) M with [a, b] = W x (Acharya 2025, Gated Associative Memory).

    conv is causal and depthwise with ``taps`` taps, M a matrix of ``slots`` rows that both is compared with x and read.
    The memory looks at no other token: a token sees ``taps`` - 1 tokens back in each layer, and no further.
    """

    stage: ClassVar[Literal["heads", "out"]] = "out"
    masks: ClassVar[tuple[str, ...]] = ("causal",)
    packs: ClassVar[bool] = True

    slots: int = 512
    taps: int = 3

    def check(self) -> None:
        self.require(self.slots > 0, "slots", "a positive number")
        self.require(self.taps > 0, "taps", "a positive number")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("hidden",)

    def module(self, place: Place) -> MixerModule:
        return GAMMixer(self, place)


class GAMMixer(MixerModule):
    """The module of `GAM`."""

    tag = GAM.tag

    def __init__(self, spec: GAM, place: Place) -> None:
        super().__init__()
        self.place = place
        self.conv = nn.Conv1d(place.dim, place.dim, spec.taps, groups=place.dim)
        self.memory = nn.Parameter(nn.init.xavier_uniform_(torch.empty(spec.slots, place.dim)))
        self.gate = nn.Linear(place.dim, 2 * place.dim)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden: (B, N, C) -> out (B, N, C)."""
        keep = kept(mask)
        seen = hidden if keep is None else hidden * keep.unsqueeze(-1)
        local = causal_convolution(seen.transpose(1, 2), self.conv.weight, self.conv.bias, mask).transpose(1, 2)
        recalled = (hidden @ self.memory.mT).softmax(-1) @ self.memory
        near, far = torch.sigmoid(self.gate(hidden)).chunk(2, -1)
        return near * local + far * recalled
