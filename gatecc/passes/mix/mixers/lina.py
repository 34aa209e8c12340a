"""LINA: divided linear attention with learned constants on the keys and values of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.ops.linear_attention import linear_attention
from gatecc.passes.mix.mixers.base import Mixer, MixerModule, Place
from gatecc.passes.mix.mixers.linear import everything


@dataclass(frozen=True)
class Lina(Mixer, tag="lina"):
    """q (k^T v) / (q · sum k) with q <- relu(q) + eps, k <- kappa (relu(k) + eps), v <- nu v, in float32 (LINA).

    kappa and nu hold a number for each head and token and start at 1, so there are parameters for one number of tokens.
    """

    fixed_length: ClassVar[bool] = True

    eps: float = 1e-6

    def check(self) -> None:
        self.require(self.eps > 0, "eps", "a positive number")

    def module(self, place: Place) -> MixerModule:
        return LinaMixer(self, place)


class LinaMixer(MixerModule):
    """The module of `Lina`."""

    tag = Lina.tag

    def __init__(self, spec: Lina, place: Place) -> None:
        super().__init__()
        self.spec, self.place = spec, place
        self.kappa = nn.Parameter(torch.ones(place.kv_heads, place.tokens or 0, 1))
        self.nu = nn.Parameter(torch.ones(place.kv_heads, place.tokens or 0, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q: (B, H, N, D), k and v: (B, Hk, N, D) -> heads (B, H, N, Dv)."""
        q = F.relu(q.float()) + self.spec.eps
        k = (F.relu(k.float()) + self.spec.eps) * self.kappa.float()
        heads = v.float() * self.nu.float()
        if self.place.causal:
            mixed = linear_attention(q, k, heads, scale=1.0, normalize=True, mask=mask)[0]
        else:
            mixed = everything(q, k, heads, 1.0, True, mask)
        return mixed.to(v.dtype)
