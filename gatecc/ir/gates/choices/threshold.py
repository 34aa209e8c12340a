"""As many experts as a token needs: all above a threshold, or all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.anneal import Anneal, least
from gatecc.ir.gates.choice import Buffers, Choice, Chosen, filled, renormalised

Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Threshold(Choice, tag="threshold"):
    """Every expert whose softmax (or sigmoid) exceeds t, and always the best one; with ``renorm`` weights sum to 1."""

    t: float | Anneal = 0.1
    score: Score = "softmax"
    renorm: bool = True

    def check(self) -> None:
        self.require(least(self.t) >= 0, "t", "a number >= 0")

    @property
    def sums_to_one(self) -> bool:
        return self.renorm

    @property
    def annealed(self) -> Mapping[str, float | Anneal]:
        return {"threshold": self.t}

    def slots(self, experts: int) -> int:
        return experts

    def probabilities(self, logits: Tensor, buffers: Buffers) -> Tensor:
        return torch.softmax(logits, -1) if self.score == "softmax" else renormalised(torch.sigmoid(logits))

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        p = torch.softmax(logits, -1) if self.score == "softmax" else torch.sigmoid(logits)
        best = torch.zeros_like(p, dtype=torch.bool).scatter(-1, logits.argmax(-1, keepdim=True), True)
        chosen = filled((p > buffers["threshold"]) | best, p)
        return Chosen(renormalised(chosen.weights), chosen.indices) if self.renorm else chosen


@dataclass(frozen=True)
class Dense(Choice, tag="dense"):
    """Every expert, weighed by the softmax of the scores or by their normalised sigmoid.

    With ``splits`` the experts are in so many parts of equal size, in order, and the weights of each part sum to 1: the
    task tables of multi-head adapter routing (MHR, 2023); ``dense(sigmoid)`` alone is Poly.
    """

    score: Score = "softmax"
    splits: int = 1

    def check(self) -> None:
        self.require(self.splits > 0, "splits", "a positive integer")

    @property
    def sums_to_one(self) -> bool:
        return self.splits == 1

    def slots(self, experts: int) -> int:
        if experts % self.splits:
            raise ArgumentError("the splits are not of one size", found=f"{experts} experts in {self.splits} splits")
        return experts

    def probabilities(self, logits: Tensor, buffers: Buffers) -> Tensor:
        return self._weights(logits) / self.splits

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        weights = self._weights(logits)
        return Chosen(weights, torch.arange(weights.size(-1), device=weights.device).expand_as(weights))

    def _weights(self, logits: Tensor) -> Tensor:
        apart = logits.unflatten(-1, (self.splits, -1))
        return (torch.softmax(apart, -1) if self.score == "softmax" else renormalised(torch.sigmoid(apart))).flatten(-2)
