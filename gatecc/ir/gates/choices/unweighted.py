"""Unweighted: the k largest scores, and each of their experts counts whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gatecc.ir.gates.choice import Buffers, Choice, Chosen, at_most, largest


@dataclass(frozen=True)
class Unweighted(Choice, tag="unweighted"):
    """The k largest, each with weight 1, for experts that are parts of one layer (MoEfication, 2021).

    With k = E the layer is whole, whatever the scores are. The router learns by straight-through: a weight has the
    gradient of the sigmoid of its score.
    """

    k: int

    def check(self) -> None:
        self.require(self.k > 0, "k", "a positive integer")

    def slots(self, experts: int) -> int:
        return at_most(self.k, experts)

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        indices = largest(logits, self.k)
        soft = torch.sigmoid(logits.gather(-1, indices))
        return Chosen(1 + (soft - soft.detach()), indices)
