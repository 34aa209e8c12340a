"""Prefix: how many experts a token takes, in their order, from none to all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gatecc.ir.gates.choice import Buffers, Choice, Chosen


@dataclass(frozen=True)
class Prefix(Choice, tag="prefix"):
    """The first n experts, each with weight 1; n is where the largest of E + 1 scores is (Adaptive Computation
    Modules).

    In evaluation the slots behind n are empty: nothing runs there. In training all run, and n is drawn by a hard Gumbel
    softmax of temperature ``T``: the weights are 1 and 0, and each has the gradient of the probability that n reaches
    it. ``lead`` is added to the score of all E experts, so that a fresh router takes all of them.
    """

    T: float = 1.0
    lead: float = 4.0

    def check(self) -> None:
        self.require(self.T > 0, "T", "a positive number")

    def slots(self, experts: int) -> int:
        return experts

    def scores(self, experts: int) -> int:
        return experts + 1

    def probabilities(self, logits: Tensor, buffers: Buffers) -> Tensor:
        reached = _reaches(torch.softmax(self.led(logits), -1))
        return reached / reached.sum(-1, keepdim=True).clamp_min(torch.finfo(reached.dtype).tiny)

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        logits, at = self.led(logits), torch.arange(logits.size(-1) - 1, device=logits.device)
        if not training:
            taken = at < logits.argmax(-1, keepdim=True)
            return Chosen(taken.to(logits.dtype), torch.where(taken, at, at.numel()))
        uniform = torch.rand_like(logits).clamp_min(torch.finfo(logits.dtype).tiny)
        soft = torch.softmax((logits - torch.log(-torch.log(uniform))) / self.T, -1)
        hard = torch.nn.functional.one_hot(soft.argmax(-1), soft.size(-1)).to(soft.dtype)
        return Chosen(_reaches(hard - soft.detach() + soft), at.expand(logits.size(0), -1))

    def led(self, logits: Tensor) -> Tensor:
        """The scores of the counts with the lead: (T, E + 1)."""
        return torch.cat([logits[:, :-1], logits[:, -1:] + self.lead], -1)


def _reaches(counts: Tensor) -> Tensor:
    """The probability that the count is 1 or more, 2 or more, ..., E: (T, E + 1) -> (T, E)."""
    return counts.flip(-1).cumsum(-1).flip(-1)[:, 1:]
