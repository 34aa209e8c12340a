"""A sigmoid per expert, of which the k largest run: the router of DeepSeek-V3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.choice import BIAS, Buffers, Choice, Chosen, at_most, largest, renormalised


@dataclass(frozen=True)
class SigmoidTopK(Choice, tag="sigmoid_topk"):
    """The k largest of σ(logits) + expert_bias, weighed by scale · σ(logits), with ``renorm`` divided by their sum.

    The experts are in ``groups`` of equal size, in order; only those of the ``limit`` best groups may be chosen, a
    group being as good as its two best experts together (DeepSeek-V3). ``bias`` keeps a buffer ``expert_bias`` that is
    added where experts are selected; balance=bias moves it.
    """

    biased: ClassVar[bool] = True
    k: int
    groups: int = 1
    limit: int = 1
    scale: float = 1.0
    renorm: bool = True
    bias: bool = False

    def check(self) -> None:
        self.require(self.k > 0, "k", "a positive integer")
        self.require(self.groups > 0, "groups", "a positive integer")
        self.require(0 < self.limit <= self.groups, "limit", f"1 to groups={self.groups}")
        self.require(self.scale > 0, "scale", "a positive number")

    @property
    def sums_to_one(self) -> bool:
        return self.renorm and self.scale == 1.0

    def slots(self, experts: int) -> int:
        if experts % self.groups:
            raise ArgumentError(
                "the groups of experts are not of one size", found=f"{experts} experts in {self.groups} groups"
            )
        return at_most(self.k, experts // self.groups * self.limit)

    def buffers(self, experts: int) -> dict[str, Tensor]:
        return {BIAS: torch.zeros(experts)} if self.bias else {}

    def probabilities(self, logits: Tensor, buffers: Buffers) -> Tensor:
        return renormalised(torch.sigmoid(logits))

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        scores = torch.sigmoid(logits)
        selecting = scores + buffers[BIAS] if BIAS in buffers else scores
        indices = largest(self._within_groups(selecting), self.k)
        weights = scores.gather(-1, indices)
        weights = renormalised(weights) if self.renorm else weights
        return Chosen(weights if self.scale == 1.0 else weights * self.scale, indices)

    def _within_groups(self, scores: Tensor) -> Tensor:
        if self.limit == self.groups:
            return scores
        grouped = scores.unflatten(-1, (self.groups, -1))
        best = grouped.gather(-1, largest(grouped, min(2, grouped.size(-1)))).sum(-1)
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter(-1, largest(best, self.limit), True)
        return torch.where(chosen.unsqueeze(-1), grouped, -torch.inf).flatten(-2)
