"""ViG: gated linear attention in both directions over the patches of an image, beside a local path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ops.linear_attention import linear_attention
from gatecc.passes.mix.mixers.base import Mixer, MixerModule, Place


@dataclass(frozen=True)
class ViG(Mixer, tag="vig"):
    """The mean of gated linear attention forwards and backwards, blended with the input itself (Liao et al. 2024, ViG).

    o = g * RMSNorm((o_f + o_b) / 2) + (1 - g) * RMSNorm(x), a head each, with g = sigmoid(W x + b). Both directions
    share q, k and v; one projection of ``rank`` gives the decays of both, exp(logsigmoid(W2 W1 x + b) /
    ``normalizer``). x, which q, k and v are read from as well, is the input after a convolution over its grid
    (`GridConv`). ``rope`` keeps the rotary embedding of q and k.
    """

    masks: ClassVar[tuple[str, ...]] = ("bidirectional",)

    rank: int = 16
    normalizer: float = 16.0
    rope: bool = False

    def check(self) -> None:
        self.require(self.rank > 0, "rank", "a positive number")
        self.require(self.normalizer > 0, "normalizer", "a positive number")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("q", "k", "v", "hidden") if self.rope else ("q_raw", "k_raw", "v", "hidden")

    def module(self, place: Place) -> MixerModule:
        return ViGMixer(self, place)


class ViGMixer(MixerModule):
    """The module of `ViG`."""

    tag = ViG.tag

    def __init__(self, spec: ViG, place: Place) -> None:
        super().__init__()
        width = place.heads * place.value
        if place.dim != width:
            raise ArgumentError(
                "the local path of ViG is the input, split into heads",
                found=f"an input of {place.dim} channels and {place.heads} heads of {place.value}",
                expected="as many channels in both",
                do="leave these sites out",
            )
        self.spec, self.place = spec, place
        self.down = nn.Linear(place.dim, spec.rank, bias=False)
        self.up = nn.Linear(spec.rank, 2 * place.heads * place.key)
        self.gate = nn.Linear(place.dim, width)
        self.norm = nn.RMSNorm(place.value, eps=1e-5)
        self.local_norm = nn.RMSNorm(place.value, eps=1e-5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """q: (B, H, N, D), k and v: (B, Hk, N, D), hidden: (B, N, C) -> heads (B, H, N, Dv)."""
        logits = enumerate(self._heads(self.up(self.down(hidden)), 2).chunk(2, 1))
        options: dict[str, Any] = {"mask": mask, "gate_normalizer": self.spec.normalizer}
        seen = [linear_attention(q, k, v, x, reverse=back > 0, **options)[0] for back, x in logits]
        gate = torch.sigmoid(self._heads(self.gate(hidden)))
        wide, local = self.norm(((seen[0] + seen[1]) * 0.5).to(v.dtype)), self.local_norm(self._heads(hidden))
        return (gate * wide + (1 - gate) * local).to(v.dtype)

    def _heads(self, x: Tensor, times: int = 1) -> Tensor:
        """(B, N, times * H * D) -> (B, times * H, N, D)."""
        return x.unflatten(-1, (times * self.place.heads, -1)).transpose(1, 2)
