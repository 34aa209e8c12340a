"""Dense to sparse: training starts with all experts and ends with k, as a temperature falls (EvoMoE)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gatecc.ir.gates.anneal import Anneal, Exponential, least
from gatecc.ir.gates.choice import Buffers, Choice, Chosen, Decision, at_most, largest, renormalised


@dataclass(frozen=True)
class DenseToSparse(Choice, tag="dense_to_sparse"):
    """In training p = softmax((logits + Gumbel noise) / T); a token takes its max(k, m) best experts.

    m is the mean number of experts per token whose p exceeds ``threshold``. A large T makes all probabilities equal
    and all experts active, and T towards 0 leaves k. In eval the softmax over the k largest logits (EvoMoE, 2021).
    """

    k: int = 1
    T: float | Anneal = Exponential(2.0, 0.3, 10_000)
    threshold: float = 1e-3
    renorm: bool = True

    def check(self) -> None:
        self.require(self.k > 0, "k", "a positive integer")
        self.require(least(self.T) > 0, "T", "a positive number")
        self.require(0 < self.threshold < 1, "threshold", "0 < threshold < 1")

    @property
    def sums_to_one(self) -> bool:
        return self.renorm

    @property
    def annealed(self) -> Mapping[str, float | Anneal]:
        return {"temperature": self.T}

    def slots(self, experts: int) -> int:
        at_most(self.k, experts)
        return experts

    def probabilities(self, logits: Tensor, buffers: Buffers) -> Tensor:
        return torch.softmax(logits / buffers["temperature"], -1)

    def decide(self, logits: Tensor, buffers: Buffers, training: bool, keep: Tensor | None = None) -> Decision:
        if not training:
            indices = largest(logits, self.k)
            chosen = Chosen(torch.softmax(logits.gather(-1, indices), -1), indices)
            return Decision(chosen, self.probabilities(logits, buffers))
        noise = -torch.log(torch.empty_like(logits).exponential_())
        p = torch.softmax((logits + noise) / buffers["temperature"], -1)
        order = largest(p, p.size(-1))
        active = torch.arange(p.size(-1), device=p.device) < self._count(p, keep)
        weights = torch.where(active, p.gather(-1, order), 0.0)
        chosen = Chosen(renormalised(weights) if self.renorm else weights, torch.where(active, order, p.size(-1)))
        return Decision(chosen, p)

    def _count(self, p: Tensor, keep: Tensor | None) -> Tensor:
        """How many experts each token takes: one number for the batch."""
        above = (p > self.threshold).sum(-1).float()
        real = torch.ones_like(above) if keep is None else keep.float()
        mean = (above * real).sum() / real.sum().clamp_min(1.0)
        return mean.clamp_min(float(self.k)).round()
