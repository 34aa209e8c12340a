"""Expert choice: experts choose tokens, and not tokens experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gatecc.ir.gates.anneal import Anneal, least
from gatecc.ir.gates.choice import Buffers, Choice, Decision, filled


@dataclass(frozen=True)
class ExpertChoice(Choice, tag="expert_choice"):
    """Each expert takes the ceil(capacity · T / E) tokens to which softmax(logits) gives it most; its weight is that.

    ``capacity`` is the mean number of experts per token; "all" is E: every expert takes every token, which is where
    a dense model is converted without a change, and from where ``capacity=linear(8, 2, 1000)`` leads on. A token may
    get no expert. What a token gets depends on all others of the batch, later ones too: the model is not causal
    (Zhou et al. 2022), and a decoder refuses it.
    """

    mixes_tokens: ClassVar[bool] = True
    capacity: Literal["all"] | float | Anneal = "all"

    def check(self) -> None:
        self.require(self.capacity == "all" or least(self.capacity) > 0, "capacity", "a positive number, or all")

    @property
    def sums_to_one(self) -> bool:
        return self.capacity == "all"

    @property
    def annealed(self) -> Mapping[str, float | Anneal]:
        return {} if self.capacity == "all" else {"capacity": self.capacity}

    def slots(self, experts: int) -> int:
        return experts

    def decide(self, logits: Tensor, buffers: Buffers, training: bool, keep: Tensor | None = None) -> Decision:
        p = torch.softmax(logits, -1)
        if "capacity" not in buffers:
            return Decision(filled(torch.ones_like(p, dtype=torch.bool), p), p)
        tokens, experts = logits.shape
        offered = p if keep is None else torch.where(keep.unsqueeze(-1), p, -1.0)
        order = torch.sort(offered, dim=0, descending=True, stable=True).indices
        number = torch.arange(tokens, device=logits.device).unsqueeze(-1).expand_as(order)
        rank = torch.zeros_like(order).scatter(0, order, number)
        available = tokens if keep is None else keep.sum()
        taken = rank * experts < buffers["capacity"] * available  # rank < ceil(capacity · T / E), without rounding
        return Decision(filled(taken if keep is None else taken & keep.unsqueeze(-1), p), p)
