"""Sinkhorn routing: in training the probabilities become a transport plan, which uses all experts alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gatecc.ir.gates.choice import Buffers, Choice, Chosen, at_most, largest, renormalised
from gatecc.ir.gates.sinkhorn import transport_plan


@dataclass(frozen=True)
class SinkhornTopK(Choice, tag="sinkhorn_topk"):
    """The k largest of a plan P between tokens and experts; its entries, divided by their sum, are the weights.

    P = Sinkhorn(exp(logits / eps)): rows sum to 1, columns to T / E. It is used in the fraction ``p`` of the training
    steps, evenly spread; in the others, and always in eval, P is the softmax (Selective Sinkhorn Routing, 2025). No
    balancing loss is needed. The callback of `gatecc.train.routing` decides the steps; without it all are as the first,
    which uses the plan.
    """

    k: int = 2
    p: float = 1.0
    iters: int = 20
    eps: float = 1.0

    def check(self) -> None:
        self.require(self.k > 0, "k", "a positive integer")
        self.require(0 < self.p <= 1, "p", "0 < p <= 1")
        self.require(self.iters > 0, "iters", "a positive integer")
        self.require(self.eps > 0, "eps", "a positive number")

    @property
    def sums_to_one(self) -> bool:
        return True

    @property
    def moves(self) -> bool:
        return self.p < 1

    def slots(self, experts: int) -> int:
        return at_most(self.k, experts)

    def buffers(self, experts: int) -> dict[str, Tensor]:
        return {"planned": torch.tensor(True)} if self.p < 1 else {}

    def advance(self, buffers: Buffers, step: int) -> None:
        if self.p < 1:
            buffers["planned"].fill_(math.ceil((step + 1) * self.p - 1e-9) > math.ceil(step * self.p - 1e-9))

    def probabilities(self, logits: Tensor, buffers: Buffers) -> Tensor:
        return torch.softmax(logits / self.eps, -1)

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        log = torch.log_softmax(logits / self.eps, -1)
        if not training:
            indices = largest(log, self.k)
            return Chosen(torch.softmax(log.gather(-1, indices), -1), indices)
        plan = transport_plan(log, self.iters)
        scores = torch.where(buffers["planned"], plan, log.exp()) if self.p < 1 else plan
        indices = largest(scores, self.k)
        return Chosen(renormalised(scores.gather(-1, indices)), indices)
