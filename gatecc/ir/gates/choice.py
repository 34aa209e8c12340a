"""Choice: how the scores of a router become k experts per token and their weights.

A choice is a pure function of logits (T, E) in float32 and of named buffers. Index E means an empty slot: nothing runs
there. Of equal scores the lower index comes first. A NaN counts as the largest score, so that indices are always those
of experts, and it reaches the weights of its token: the output shows it. What changes over the training steps (a
temperature, a bias) is a buffer: captured and compiled graphs follow it. Text: ``softmax_topk(2)``,
``softmax_topk(1, renorm=False)``, ``sigmoid_topk(8, groups=8, limit=4)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.anneal import Anneal, first, least
from gatecc.ir.gates.option import Option

Buffers = Mapping[str, Tensor]
Squash = Literal["none", "tanh", "sigmoid", "gelu"]
_SQUASH = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": F.gelu}
BIAS = "expert_bias"  # (E,): added to the scores that select, not to those that weigh


class Chosen(NamedTuple):
    """``weights`` (T, k) in float32 and ``indices`` (T, k) of experts, E for an empty slot."""

    weights: Tensor
    indices: Tensor


class Decision(NamedTuple):
    """What was chosen, and what balancing asks of it.

    ``probabilities`` (T, E): how likely each expert was, with a gradient. ``load`` (T, E): the smooth probability that
    an expert is among the k, where noise gives one.
    """

    chosen: Chosen
    probabilities: Tensor
    load: Tensor | None = None


@dataclass(frozen=True)
class Choice(Option, slot="choice"):
    """Base of choices."""

    mixes_tokens: ClassVar[bool] = False  # in eval: what one token gets depends on the others
    biased: ClassVar[bool] = False  # selects by score + expert_bias, where there is such a buffer

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of a token sum to 1 whatever its logits are: equal experts then compute what one does."""
        return False

    @property
    def annealed(self) -> Mapping[str, float | Anneal]:
        """The numbers that are buffers, by name."""
        return {}

    @property
    def note(self) -> str:
        """What a report should say of this choice, "" for nothing."""
        return ""

    def slots(self, experts: int) -> int:
        """How many slots a token has, at most. Raises ArgumentError for a number of experts that cannot be chosen
        from."""
        raise NotImplementedError

    def scores(self, experts: int) -> int:
        """How many scores it reads per token: E, or more where a noise is scored too."""
        return experts

    def buffers(self, experts: int) -> dict[str, Tensor]:
        """What changes from step to step and is no parameter: temperatures, biases."""
        return {name: torch.tensor(first(value)) for name, value in self.annealed.items()}

    def parameters(self, experts: int) -> dict[str, Tensor]:
        """What is trained beside the scorer."""
        return {}

    @property
    def moves(self) -> bool:
        """Whether `advance` changes anything."""
        return any(isinstance(value, Anneal) for value in self.annealed.values())

    def advance(self, buffers: Buffers, step: int) -> None:
        """Bring the buffers to a step of the optimizer, in place; the first is 0."""
        for name, value in self.annealed.items():
            if isinstance(value, Anneal):
                buffers[name].fill_(value.at(step))

    def probabilities(self, logits: Tensor, buffers: Buffers) -> Tensor:
        """How likely each expert is: (T, E), rows that sum to 1."""
        return torch.softmax(logits, -1)

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        """logits: (T, E) in float32."""
        return self.decide(logits, buffers, training).chosen

    def decide(self, logits: Tensor, buffers: Buffers, training: bool, keep: Tensor | None = None) -> Decision:
        """The same with what balancing asks. keep: (T,) of bool, False at padding, where a choice compares tokens."""
        return Decision(self(logits, buffers, training), self.probabilities(logits, buffers))


@dataclass(frozen=True)
class SoftmaxTopK(Choice, tag="softmax_topk"):
    """The k largest of softmax(pre_activation(logits) / T); with ``renorm`` divided by their sum.

    With ``renorm`` that is Mixtral's, and equal to the softmax over the k largest logits alone (Granite); without it
    Switch's and Qwen2-MoE's. With ``straight`` the weights are the renormalised ones with the gradient of the
    probabilities: the renormalised weight of one expert is always 1, from which no router could learn. ``T`` is a
    number, a schedule (``T=exponential(2.0, 0.5, 1000)``) or, with ``learned``, a parameter that starts there: learning
    it slows the estimation of the experts to as little as 1 / log(n), unless the scores go through a ``pre_activation``
    first (temperature in softmax Gaussian MoE, 2024).
    """

    biased: ClassVar[bool] = True
    k: int
    renorm: bool = True
    straight: bool = False
    T: float | Anneal = 1.0
    pre_activation: Squash = "none"
    learned: bool = False

    def check(self) -> None:
        self.require(self.k > 0, "k", "a positive integer")
        self.require(least(self.T) > 0, "T", "a positive number")
        self.require(not (self.learned and isinstance(self.T, Anneal)), "T", "a number where it is learned")

    @property
    def sums_to_one(self) -> bool:
        return self.renorm or self.straight

    @property
    def annealed(self) -> Mapping[str, float | Anneal]:
        return {} if self.learned or self.T == 1.0 else {"temperature": self.T}

    @property
    def note(self) -> str:
        if not self.learned or self.pre_activation != "none":
            return ""
        return (
            "the temperature of the router is learned together with linear scores, which slows the estimation of the "
            "experts to as little as 1 / log(n): pre_activation=tanh restores a polynomial rate, a constant or a "
            "schedule T=exponential(start, end, steps) avoids it"
        )

    def slots(self, experts: int) -> int:
        return at_most(self.k, experts)

    def parameters(self, experts: int) -> dict[str, Tensor]:
        return {"log_temperature": torch.tensor(first(self.T)).log()} if self.learned else {}

    def probabilities(self, logits: Tensor, buffers: Buffers) -> Tensor:
        return torch.softmax(self.tempered(logits, buffers), -1)

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        z = self.tempered(logits, buffers)
        bias = buffers.get(BIAS)
        indices = largest(z if bias is None else torch.softmax(z, -1) + bias, self.k)
        if self.renorm and not self.straight:
            return Chosen(torch.softmax(z.gather(-1, indices), -1), indices)
        top = torch.softmax(z, -1).gather(-1, indices)
        if not self.straight:
            return Chosen(top, indices)
        return Chosen(renormalised(top).detach() + (top - top.detach()), indices)

    def tempered(self, logits: Tensor, buffers: Buffers) -> Tensor:
        """What the softmax is taken of."""
        z = logits if self.pre_activation == "none" else _SQUASH[self.pre_activation](logits)
        if self.learned:
            return z * torch.exp(-buffers["log_temperature"].float())
        return z / buffers["temperature"] if "temperature" in buffers else z


def largest(scores: Tensor, k: int) -> Tensor:
    """Indices (..., k) of the k largest of scores (..., E), in falling order; the lower index first among equals.

    torch.topk leaves the order of equals open. NaN counts as the largest, so that indices are always those of experts.
    """
    if k == 1:
        return scores.argmax(-1, keepdim=True)
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def renormalised(weights: Tensor) -> Tensor:
    """Weights (T, k) divided by their sum."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)


def filled(active: Tensor, weights: Tensor) -> Chosen:
    """A slot per expert, empty where ``active`` (T, E) is False; weights: (T, E)."""
    experts = torch.arange(active.size(-1), device=active.device)
    indices = torch.where(active, experts, active.size(-1))
    return Chosen(torch.where(active, weights, 0.0), indices)


def at_most(k: int, experts: int) -> int:
    """k, if there are as many experts. Raises ArgumentError."""
    if k > experts:
        raise ArgumentError(
            "more experts are chosen per token than there are", found=f"k={k} of {experts}", expected=f"k <= {experts}"
        )
    return k
