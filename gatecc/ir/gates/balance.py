"""Balance: what keeps experts evenly used while a router trains.

Losses enter in the backward pass (`gatecc::add_loss`): nothing has to be carried out of the model, and compiled and
pipelined models keep them; `gatecc.aux_losses` reads their values. Padding counts nowhere if the router has a ``mask``.
``+`` joins several. Text: ``aux(0.01)``, ``aux(0.01)+z(0.001)``, ``bias(rate=0.001)``, ``capacity(1.25)``.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.ir.gates.choice import BIAS, Choice, Chosen, Decision
from gatecc.ir.gates.option import Option


@dataclass(frozen=True)
class Routed:
    """What a router did in one forward pass.

    ``logits`` (T, E) and what the choice decided; ``counts`` (T, E): 1 where an expert runs; ``real`` (T, 1): 0 at
    padding.
    """

    logits: Tensor
    decision: Decision
    counts: Tensor
    real: Tensor

    def mean(self, x: Tensor) -> Tensor:
        """The mean of x (T, ...) over the tokens that are no padding."""
        return (x * self.real.reshape(-1, *[1] * (x.dim() - 1))).sum(0) / self.real.sum().clamp_min(1.0)


@dataclass(frozen=True)
class Balance(Option, slot="balance"):
    """Base of what balances."""

    adds: ClassVar[bool] = True  # a loss

    @property
    def parts(self) -> tuple[Balance, ...]:
        """What is joined by +."""
        return (self,)

    @property
    def losses(self) -> tuple[Balance, ...]:
        """The parts that add a loss."""
        return tuple(part for part in self.parts if part.adds)

    def accepts(self, choice: Choice, trained: bool) -> str:
        """What this needs of a choice, "" if this one will do. ``trained``: gradients train the scorer."""
        return "" if trained or not self.adds else "a scorer that gradients train"

    def buffers(self, experts: int) -> dict[str, Tensor]:
        """What is kept and saved between steps."""
        return {}

    def loss(self, routed: Routed) -> Tensor:
        """The loss with its weight: ()."""
        raise NotImplementedError

    @classmethod
    def read_node(cls, node: ast.expr) -> Self:
        """``a + b`` joins."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return cls.coerce((cls.read_node(node.left), cls.read_node(node.right)))
        return super().read_node(node)

    @classmethod
    def coerce(cls, value: Any) -> Self:
        """As for every option; a tuple or a list is joined."""
        if isinstance(value, (tuple, list)):
            return cls.make("join", (tuple(value),), {})
        return super().coerce(value)


@dataclass(frozen=True)
class NoBalance(Balance, tag="none"):
    """Nothing."""

    adds: ClassVar[bool] = False


@dataclass(frozen=True)
class Join(Balance, tag="join"):
    """Several, each once."""

    adds: ClassVar[bool] = False
    of: tuple[Balance, ...]

    def check(self) -> None:
        flat = tuple(part for balance in self.of for part in balance.parts)
        object.__setattr__(self, "of", flat)
        tags = [part.tag for part in flat]
        self.require(
            len(flat) > 1 and len(set(tags)) == len(tags) and "none" not in tags, "of", "two or more, each once"
        )

    def __str__(self) -> str:
        return "+".join(map(str, self.of))

    @property
    def parts(self) -> tuple[Balance, ...]:
        return self.of

    def accepts(self, choice: Choice, trained: bool) -> str:
        return next((found for part in self.of if (found := part.accepts(choice, trained))), "")

    def buffers(self, experts: int) -> dict[str, Tensor]:
        return {name: tensor for part in self.of for name, tensor in part.buffers(experts).items()}


@dataclass(frozen=True)
class Auxiliary(Balance, tag="aux"):
    """weight · E · Σ_e f_e P_e, P_e the mean probability of expert e and f_e its share of the tokens (Switch, 2021).

    f_e = count_e / (T k), so that balanced experts give ``weight``; with ``normalise_by_k=False`` f_e = count_e / T, as
    transformers counts it, and they give k · weight.
    """

    weight: float = 0.01
    normalise_by_k: bool = True

    def check(self) -> None:
        self.require(self.weight > 0, "weight", "a positive number")

    def loss(self, routed: Routed) -> Tensor:
        share = routed.mean(routed.counts)
        share = share / share.sum().clamp_min(1e-9) if self.normalise_by_k else share
        probability = routed.mean(routed.decision.probabilities)
        return self.weight * probability.size(0) * (share.detach() * probability).sum()


@dataclass(frozen=True)
class ZLoss(Balance, tag="z"):
    """weight · mean_t logsumexp(logits_t)²: logits stay small (ST-MoE, 2022)."""

    weight: float = 1e-3

    def check(self) -> None:
        self.require(self.weight > 0, "weight", "a positive number")

    def loss(self, routed: Routed) -> Tensor:
        return self.weight * routed.mean(torch.logsumexp(routed.logits, -1).square())


@dataclass(frozen=True)
class Variation(Balance, tag="cv2"):
    """weight · CV² of the importance (sum of an expert's weights), of the load, or of both (Shazeer et al., 2017).

    CV² = variance / mean². The load is the smooth one of choice=noisy_topk in training; other choices have a load
    without a gradient, so that ``of`` has to be importance.
    """

    weight: float = 0.01
    of: Literal["both", "importance", "load"] = "both"

    def check(self) -> None:
        self.require(self.weight > 0, "weight", "a positive number")

    def accepts(self, choice: Choice, trained: bool) -> str:
        if self.of != "importance" and choice.tag != "noisy_topk":
            return "choice=noisy_topk, whose load has a gradient; or cv2(of=importance)"
        return super().accepts(choice, trained)

    def loss(self, routed: Routed) -> Tensor:
        values: list[Tensor] = []
        if self.of != "load":
            values.append(importance(routed))
        if self.of != "importance" and routed.decision.load is not None:
            values.append((routed.decision.load * routed.real).sum(0))
        return self.weight * sum((_variation(v) for v in values), routed.logits.new_zeros(()))


@dataclass(frozen=True)
class LossFreeBias(Balance, tag="bias"):
    """No loss: ``expert_bias`` is added to the scores that select, and once per step of the optimizer it moves by
    ``rate`` up for experts below the mean load and down for those above it (Wang et al., 2024; DeepSeek-V3).

    `gatecc.train.routing` does it, with the counts of all processes.
    """

    adds: ClassVar[bool] = False
    rate: float = 1e-3

    def check(self) -> None:
        self.require(self.rate > 0, "rate", "a positive number")

    def accepts(self, choice: Choice, trained: bool) -> str:
        return "" if choice.biased else "choice=softmax_topk or sigmoid_topk, which select with a bias"

    def buffers(self, experts: int) -> dict[str, Tensor]:
        return {BIAS: torch.zeros(experts)}

    def moved(self, bias: Tensor, counts: Tensor) -> Tensor:
        """The bias (E,) after a step with these counts (E,)."""
        return bias + self.rate * torch.sign(counts.mean() - counts)


@dataclass(frozen=True)
class Capacity(Balance, tag="capacity"):
    """In training an expert takes at most ceil(factor · S / E) of S slots, first choices first, in the order of tokens.

    The others are dropped: they get index E, and what stands around the experts carries the token. Without it nothing
    is dropped. `gatecc.routing` reports the share of drops.
    """

    adds: ClassVar[bool] = False
    factor: float = 1.25

    def check(self) -> None:
        self.require(self.factor > 0, "factor", "a positive number")

    def accepts(self, choice: Choice, trained: bool) -> str:
        return "a choice of tokens: experts that choose have a capacity of their own" if choice.mixes_tokens else ""

    def limited(self, chosen: Chosen, experts: int, real: Tensor) -> Chosen:
        """The slots that fit."""
        tokens, k = chosen.indices.shape
        wanted = torch.where(real.bool(), chosen.indices, experts).t().reshape(-1)  # all first choices, then the second
        taken = F.one_hot(wanted, experts + 1)[:, :experts]
        before = (taken.cumsum(0) - taken).mul(taken).sum(-1)
        fits = (before * experts < self.factor * taken.sum()).reshape(k, tokens).t() & (real.bool())
        return Chosen(chosen.weights, torch.where(fits, chosen.indices, experts))


@dataclass(frozen=True)
class Budget(Balance, tag="budget"):
    """weight · (mean n / E − share)²: of E experts in their order, tokens take ``share`` on average (ACM, 2023)."""

    share: float = 0.5
    weight: float = 1.0

    def check(self) -> None:
        self.require(0 <= self.share <= 1, "share", "a number from 0 to 1")
        self.require(self.weight > 0, "weight", "a positive number")

    def accepts(self, choice: Choice, trained: bool) -> str:
        return super().accepts(choice, trained) if choice.tag == "prefix" else "choice=prefix, which chooses how many"

    def loss(self, routed: Routed) -> Tensor:
        taken = routed.mean(routed.decision.chosen.weights.mean(-1, keepdim=True))
        return self.weight * (taken - self.share).square().sum()


def importance(routed: Routed) -> Tensor:
    """The sum of each expert's weights, (E,), with their gradient."""
    weights, indices = routed.decision.chosen
    kept = weights * routed.real
    all_of = kept.new_zeros(kept.size(0), routed.counts.size(1) + 1).scatter_add(1, indices, kept)
    return all_of[:, :-1].sum(0)


def _variation(x: Tensor) -> Tensor:
    """CV² of (E,): 0 for one expert."""
    if x.size(0) == 1:
        return x.new_zeros(())
    return x.var() / (x.mean().square() + 1e-10)


def counts(indices: Tensor, experts: int) -> Tensor:
    """indices: (T, k) -> (T, E), 1 where an expert is among them."""
    empty = torch.zeros(indices.size(0), experts + 1, device=indices.device)
    return empty.scatter(1, indices, 1.0)[:, :-1]


def figures(routed: Routed, asked: Tensor) -> Tensor:
    """What a pass is remembered by: 1, tokens, the sum of entropies, dropped slots, loads (E,), importances (E,).

    ``asked`` (T, E): 1 where an expert was chosen, before a capacity dropped it.
    """
    p = routed.decision.probabilities.detach()
    entropy = -(torch.xlogy(p, p).sum(-1, keepdim=True) * routed.real).sum()
    load = (routed.counts * routed.real).sum(0)
    dropped = (asked * routed.real).sum() - load.sum()
    head = torch.stack((torch.ones_like(entropy), routed.real.sum(), entropy, dropped))
    return torch.cat((head, load, importance(routed).detach()))
