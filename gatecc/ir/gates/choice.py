"""Choice: how the scores of a router become k experts per token and their weights.

A choice is a pure function of logits (T, E) in float32. Index E means an empty slot: nothing runs there.
Text: ``softmax_topk(2)``, ``softmax_topk(1, renorm=False)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.option import Option

Buffers = Mapping[str, Tensor]


class Chosen(NamedTuple):
    """``weights`` (T, k) in float32 and ``indices`` (T, k) of experts, E for an empty slot."""

    weights: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Choice(Option, slot="choice"):
    """Base of choices."""

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of a token sum to 1 whatever its logits are: equal experts then compute what one does."""
        return False

    def slots(self, experts: int) -> int:
        """How many slots a token has. Raises ArgumentError for a number of experts that cannot be chosen from."""
        raise NotImplementedError

    def buffers(self, experts: int) -> dict[str, Tensor]:
        """What changes from step to step and is no parameter: temperatures, biases."""
        return {}

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        """logits: (T, E) in float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class SoftmaxTopK(Choice, tag="softmax_topk"):
    """The k largest of softmax(logits); with ``renorm`` their weights are divided by their sum (Mixtral).

    That is the softmax over the k largest logits (Granite), so no probability is computed for the others. Without
    ``renorm`` the weights are the probabilities themselves (Switch, Qwen2-MoE). With ``straight`` they are the
    renormalised ones with the gradient of the probabilities: the renormalised weight of one expert is always 1, from
    which no router could learn.
    """

    k: int
    renorm: bool = True
    straight: bool = False

    def check(self) -> None:
        self.require(self.k > 0, "k", "a positive integer")

    @property
    def sums_to_one(self) -> bool:
        return self.renorm or self.straight

    def slots(self, experts: int) -> int:
        return at_most(self.k, experts)

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        if self.renorm and not self.straight:
            top, indices = torch.topk(logits, self.k, -1)
            return Chosen(torch.softmax(top, -1), indices)
        top, indices = torch.topk(torch.softmax(logits, -1), self.k, -1)
        if not self.straight:
            return Chosen(top, indices)
        return Chosen((top / top.sum(-1, keepdim=True)).detach() + (top - top.detach()), indices)


def at_most(k: int, experts: int) -> int:
    """k, if there are as many experts. Raises ArgumentError."""
    if k > experts:
        raise ArgumentError(
            "more experts are chosen per token than there are", found=f"k={k} of {experts}", expected=f"k <= {experts}"
        )
    return k
