"""PerGroup: one choice in each group of experts, so that no group is ever without one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.choice import Buffers, Choice, Chosen, at_most, largest


@dataclass(frozen=True)
class PerGroup(Choice, tag="per_group"):
    """The k largest in each of ``groups`` groups of neighbouring experts, softmax over them: each group weighs 1 in
    all.

    Experts that are parts of one layer are covered whatever the logits are. Ties between experts of different groups,
    on which top-k over all of them would depend, do not matter. Slots: those of the first group, then of the second.
    With ``k=1`` the weight is 1, and the router learns by straight-through: its gradient is that of the softmax.
    """

    groups: int
    k: int = 1

    def check(self) -> None:
        self.require(self.groups > 0, "groups", "a positive number")
        self.require(self.k > 0, "k", "a positive number")

    def slots(self, experts: int) -> int:
        if experts % self.groups:
            raise ArgumentError(
                "the experts do not fall into groups of one size",
                found=f"{experts} experts, {self.groups} groups",
                expected=f"a multiple of {self.groups} experts",
            )
        return self.groups * at_most(self.k, experts // self.groups)

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        apart = logits.unflatten(-1, (self.groups, -1))
        each = apart.size(-1)
        at = largest(apart, self.k)
        top = apart.gather(-1, at)
        weights = torch.softmax(top, -1)
        if self.k == 1:
            soft = torch.softmax(apart, -1).gather(-1, at)
            weights = weights + (soft - soft.detach())
        first = torch.arange(self.groups, device=logits.device).unsqueeze(-1) * each
        return Chosen(weights.flatten(1), (at + first).flatten(1))
