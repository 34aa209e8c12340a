"""Masked: copies of the dense layer, each without a random share of its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gatecc.passes.route.ffn import Stacked
from gatecc.passes.route.spec import ExpertsSpec


@dataclass(frozen=True)
class Masked(ExpertsSpec, tag="masked"):
    """Copies in which a random ``share`` of the weights is 0, others in each expert: diverse experts that keep most of
    what the layer knows (EvoMoE, 2021). Without a share they are copies.
    """

    n: int
    share: float = 0.1

    def check(self) -> None:
        self.require(self.n > 0, "n", "a positive number of experts")
        self.require(0 <= self.share < 1, "share", "a number in [0, 1)")

    @property
    def count(self) -> int:
        return self.n

    @property
    def keeps_function(self) -> bool:
        return not self.share

    def finish(self, experts: Stacked, dense: Stacked) -> None:
        if self.share:
            for stack in (experts.gate_up, experts.down):
                stack.mul_(torch.rand(stack.shape, device=stack.device) >= self.share)
