"""Hopfield: attention whose queries are updated several times before they read the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gatecc.ops.state_space import StateSpace, of_weights
from gatecc.passes.mix.mixers.base import Mixer, MixerModule, Place
from gatecc.passes.mix.mixers.hybrid import grouped
from gatecc.passes.mix.mixers.packed import together


@dataclass(frozen=True)
class Hopfield(Mixer, tag="hopfield"):
    """xi <- softmax(beta xi K^T) K, ``steps`` - 1 times, then softmax(beta xi K^T) V (Ramsauer et al. 2021).

    ``beta`` is the scale of the attention where it is 0; one step then is the attention itself. The number of steps is
    fixed: stopping at a tolerance would depend on the data, which a graph cannot do.
    """

    masks: ClassVar[tuple[str, ...]] = ("causal", "bidirectional")
    packs: ClassVar[bool] = True

    steps: int = 3
    beta: float = 0.0

    def check(self) -> None:
        self.require(self.steps > 0, "steps", "at least one")

    def module(self, place: Place) -> MixerModule:
        return HopfieldMixer(self, place)


class HopfieldMixer(MixerModule):
    """The module of `Hopfield`."""

    tag = Hopfield.tag

    def __init__(self, spec: Hopfield, place: Place) -> None:
        super().__init__()
        self.spec, self.place = spec, place

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q: (B, H, N, D), k and v: (B, Hk, N, D) -> heads (B, H, N, Dv)."""
        return self._final(q, k, mask) @ grouped(v, q.size(1))

    def state_space(self, *values: Tensor) -> StateSpace:
        """The cache of values, read with the last weights."""
        q, k, v, *mask = values
        return of_weights(self._final(q, k, *mask), v)

    def _final(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weights that read the values, after the updates of the queries: (B, H, N, N)."""
        k = grouped(k, q.size(1))
        for _ in range(self.spec.steps - 1):
            q = self._weights(q, k, mask) @ k
        return self._weights(q, k, mask)

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        scores = (q @ k.mT) * (self.spec.beta or self.place.scale)
        tokens = q.size(2)
        if self.place.causal:
            at = torch.arange(tokens, device=q.device)
            distance = at[:, None] - at[None]
            seen = (distance >= 0) & (distance < (self.place.window or tokens))
            scores = scores.masked_fill(~seen, float("-inf"))
        if mask is not None:
            own = torch.eye(tokens, dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(~(together(mask) | own), float("-inf"))
        return scores.softmax(-1)
