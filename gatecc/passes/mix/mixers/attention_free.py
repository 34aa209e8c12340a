"""Attention-free mixing: weights from keys alone and from pairwise features, none from products of queries and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.passes.mix.mixers.base import Mixer, MixerModule, Place
from gatecc.passes.mix.mixers.hybrid import grouped


@dataclass(frozen=True)
class AttentionFree(Mixer, tag="attention_free"):
    """sigmoid(q) * (e^A' (e^K' * v)) / (e^A' e^K'), K' = softmax of k over tokens, A' = softmax of A over keys.

    A is made from features of pairs of tokens, inputs of the model that ``edges`` names, each (B, N, N), such as
    distances and durations; ``coordinates`` names an input (B, N, 2) whose angles atan2(y_i - y_j, x_i - x_j) are one
    more. Each is embedded by Linear, ReLU, Linear with ``width`` features (0: as many as the model's channels), the
    embeddings are mixed by a gate, and A is linear in the mixture. Two are mixed by sigmoid(W [e1, e2]), more by
    softmax(W [e1, e2, ...] / exp(``temperature``)). Without any, every token reads the same average of values.

    This is the module of RRNCO (Son et al. 2025) after AFT (Zhai et al. 2021).
    """

    masks: ClassVar[tuple[str, ...]] = ("bidirectional",)

    edges: tuple[str, ...] = ()
    coordinates: str = ""
    width: int = 0
    temperature: float = 5.0

    def check(self) -> None:
        self.require(self.width >= 0, "width", "a number of features, or 0")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("q_raw", "k_raw", "v")

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.edges, self.coordinates) if self.coordinates else self.edges

    def module(self, place: Place) -> MixerModule:
        return AttentionFreeMixer(self, place)


class AttentionFreeMixer(MixerModule):
    """The module of `AttentionFree`."""

    tag = AttentionFree.tag

    def __init__(self, spec: AttentionFree, place: Place) -> None:
        super().__init__()
        if place.key != place.value:
            raise ArgumentError(
                "attention-free mixing multiplies values by their own queries and keys, channel by channel",
                found=f"keys of {place.key} and values of {place.value} channels",
                expected="as many channels in both",
                do="leave this site out, or choose another mixer",
            )
        self.spec, self.place = spec, place
        width = spec.width or place.dim or place.heads * place.value
        self.bias = PairBias(len(spec.inputs), width, spec.temperature) if spec.inputs else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        """q: (B, H, N, D), k and v: (B, Hk, N, D), the inputs, and a padding mask if there is one -> (B, H, N, D)."""
        count = len(self.spec.inputs)
        pairs, mask = more[:count], more[count] if len(more) > count else None
        k, v = grouped(k, q.size(1)).float(), grouped(v, q.size(1))
        weights = self._of_keys(k, mask)
        if self.bias is None:
            mean = (weights * v).sum(2, keepdim=True) / weights.sum(2, keepdim=True)
        else:
            of_pairs = self._of_pairs(self.bias, pairs, mask)
            mean = (of_pairs @ (weights * v)) / (of_pairs @ weights)
        return torch.sigmoid(q) * mean.to(q.dtype)

    def _of_keys(self, k: Tensor, mask: Tensor | None) -> Tensor:
        """e^K', (B, H, N, D), 0 at padding."""
        if mask is None:
            return k.softmax(2).exp()
        seen = mask[:, None, :, None]
        return k.masked_fill(~seen, float("-inf")).softmax(2).exp() * seen

    def _of_pairs(self, bias: PairBias, pairs: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """e^A', (B, 1, N, N)."""
        made = (*pairs[:-1], angles(pairs[-1])) if self.spec.coordinates else pairs
        score = bias(*made).float()
        if mask is not None:
            score = score.masked_fill(~mask[:, None, :], float("-inf"))
        return score.softmax(-1).exp().unsqueeze(1)


class PairBias(nn.Module):
    """A from features of pairs. No constant is added to A: the softmax over keys would cancel it."""

    def __init__(self, count: int, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.embed = nn.ModuleList(
            nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width, bias=count > 1)) for _ in range(count)
        )
        self.gate = nn.Linear(count * width, 1 if count == 2 else count) if count > 1 else None
        self.out = nn.Linear(width, 1, bias=False)

    def forward(self, *pairs: Tensor) -> Tensor:
        """Features (B, N, N) each -> A (B, N, N)."""
        dtype = self.out.weight.dtype
        embedded = [embed(x.unsqueeze(-1).to(dtype)) for embed, x in zip(self.embed, pairs, strict=True)]
        return self.out(self._mixed(embedded)).squeeze(-1)

    def _mixed(self, embedded: list[Tensor]) -> Tensor:
        if self.gate is None:
            return embedded[0]
        score = self.gate(torch.cat(embedded, -1))
        if len(embedded) == 2:
            share = torch.sigmoid(score)
            return share * embedded[0] + (1 - share) * embedded[1]
        share = (score * math.exp(-self.temperature)).softmax(-1)
        return torch.stack([share[..., i, None] * e for i, e in enumerate(embedded)]).sum(0)


def angles(coordinates: Tensor) -> Tensor:
    """coordinates: (B, N, 2) -> the directions between them (B, N, N), 0 from a point to itself."""
    between = coordinates.unsqueeze(2) - coordinates.unsqueeze(1)
    return torch.atan2(between[..., 1], between[..., 0])
