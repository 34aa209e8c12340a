"""Rule: when a sample leaves at an exit. A score in [0, 1] is read from the logits there, and meets a threshold.

``threshold`` is a buffer of the rule's module, so that calibration moves it and captured graphs follow. Above 1 no
sample leaves; at 0 or below every one does. Where the score is NaN, the sample goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gatecc.ir.gates.option import Option
from gatecc.ir.gates.source import entropy, logit_statistics

NEVER = 2.0


@dataclass(frozen=True)
class ExitRule(Option, slot="rule"):
    """Base of rules. ``threshold``: where it starts; above 1 nobody leaves."""

    threshold: float = NEVER

    def module(self, classes: int) -> RuleModule:
        """The module of one exit with so many logits."""
        raise NotImplementedError


class RuleModule(nn.Module):
    """logits (B, C) -> which samples go on, (B, 1) of bool; of tokens (B, N, C) -> (B, N, 1)."""

    threshold: Tensor
    place: int  # exits in order along the depth

    def __init__(self, rule: ExitRule) -> None:
        super().__init__()
        self.rule, self.place = rule, 0
        self.register_buffer("threshold", torch.tensor(rule.threshold))

    def score(self, logits: Tensor) -> Tensor:
        """How sure the exit is, in [0, 1]. (B, C) -> (B,)"""
        raise NotImplementedError

    def forward(self, logits: Tensor) -> Tensor:
        leaves = self.score(logits.to(torch.promote_types(logits.dtype, torch.float32))) >= self.threshold
        return leaves.logical_not().unsqueeze(-1)


@dataclass(frozen=True)
class Confidence(ExitRule, tag="confidence"):
    """A statistic of the probabilities: the largest (``pmax``), the two largest apart (``margin``), 1 - entropy, or
    1 - the entropy of p^``power`` (``powered``), entropies over log(classes)."""

    of: Literal["pmax", "margin", "entropy", "powered"] = "pmax"
    power: float = 2.0

    def check(self) -> None:
        self.require(self.power > 0, "power", "a positive number")

    def module(self, classes: int) -> RuleModule:
        return ConfidenceRule(self)


class ConfidenceRule(RuleModule):
    """The module of `Confidence`."""

    rule: Confidence

    def score(self, logits: Tensor) -> Tensor:
        if self.rule.of == "pmax":
            return torch.softmax(logits, -1).amax(-1)
        if self.rule.of == "margin":
            first, second = torch.topk(torch.softmax(logits, -1), 2, -1).values.unbind(-1)
            return first - second
        power = self.rule.power if self.rule.of == "powered" else 1.0
        return 1 - entropy(torch.log_softmax(logits * power, -1))


@dataclass(frozen=True)
class Learned(ExitRule, tag="learned"):
    """A learned gate on four statistics u of the logits: σ(w·u + b), of JEI-DNN. Gradients do not reach the logits.

    w and b start at 0; `gatecc.train.fit_exits` trains them.
    """

    power: float = 2.0

    def check(self) -> None:
        self.require(self.power > 0, "power", "a positive number")

    def module(self, classes: int) -> RuleModule:
        return LearnedRule(self)


class LearnedRule(RuleModule):
    """The module of `Learned`."""

    rule: Learned

    def __init__(self, rule: Learned) -> None:
        super().__init__(rule)
        self.gate = nn.Linear(4, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def logit(self, logits: Tensor) -> Tensor:
        """The gate's logit. (B, C) -> (B,)"""
        statistics = logit_statistics(logits.detach(), self.rule.power).to(self.gate.weight.dtype)
        return self.gate(statistics).squeeze(-1)

    def score(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(self.logit(logits).float())


@dataclass(frozen=True)
class Calibrated(ExitRule, tag="calibrated"):
    """The largest probability under the SDM activation, p_y = (2 + q)^(d z_y) / Σ_c (2 + q)^(d z_c).

    Similarity q: how many of the nearest of ``exemplars`` logits, one after the other, were predicted as this sample
    is, and rightly. Distance d: the share of the exemplars whose own nearest one is as far away or farther.
    `gatecc.train.fit_exemplars` fills them; until then q = e - 2 and d = 1, which is the softmax.
    """

    exemplars: int = 256

    def check(self) -> None:
        self.require(self.exemplars > 1, "exemplars", "two or more")

    def module(self, classes: int) -> RuleModule:
        return CalibratedRule(self, classes)


class CalibratedRule(RuleModule):
    """The module of `Calibrated`."""

    rule: Calibrated
    exemplars: Tensor  # (K, C): their logits
    predicted: Tensor  # (K,)
    right: Tensor  # (K,) of bool
    distances: Tensor  # (K,): from each to the nearest other
    fitted: Tensor  # () of bool

    def __init__(self, rule: Calibrated, classes: int) -> None:
        super().__init__(rule)
        K = rule.exemplars
        self.register_buffer("exemplars", torch.zeros(K, classes))
        self.register_buffer("predicted", torch.zeros(K, dtype=torch.int64))
        self.register_buffer("right", torch.zeros(K, dtype=torch.bool))
        self.register_buffer("distances", torch.zeros(K))
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, logits: Tensor, labels: Tensor) -> None:
        """Keep the first K of the logits (S, C) of labelled samples (S,), S >= K, as exemplars."""
        z, predicted = logits[: len(self.exemplars)].float(), logits[: len(self.exemplars)].argmax(-1)
        apart = torch.cdist(z, z).fill_diagonal_(math.inf)
        self.exemplars.copy_(z)
        self.predicted.copy_(predicted)
        self.right.copy_(predicted == labels[: len(z)])
        self.distances.copy_(apart.amin(-1))
        self.fitted.fill_(True)

    def score(self, logits: Tensor) -> Tensor:
        far = (logits.unsqueeze(-2) - self.exemplars).square().sum(-1).sqrt()
        nearest = far.argsort(-1)
        alike = (self.predicted == logits.argmax(-1, keepdim=True)) & self.right
        q = torch.gather(alike, 1, nearest).to(logits.dtype).cumprod(-1).sum(-1, keepdim=True)
        d = (self.distances >= far.amin(-1, keepdim=True)).to(logits.dtype).mean(-1, keepdim=True)
        scale = torch.where(self.fitted, torch.log(2 + q) * d, torch.ones_like(q))
        return torch.softmax(logits * scale, -1).amax(-1)


@dataclass(frozen=True)
class Acceptance(ExitRule, tag="acceptance"):
    """How likely it is that what comes later agrees: a head of ``layers`` residual blocks x + SiLU(W x) on four
    statistics of the logits (SpecDec++, whose head reads the draft's hidden state).

    At blocks a sample leaves where the probability reaches the threshold. Along the steps of a draft
    (`Decoder.speculate`) it stops where 1 - Π p exceeds the threshold h, the first token counted as 1; from h = 1 on it
    runs to its bound. `gatecc.train.fit_acceptance` trains it; before that p is 1/2.
    """

    layers: int = 1
    width: int = 16
    power: float = 2.0

    def check(self) -> None:
        self.require(self.layers >= 0 and self.width > 0, "layers", "a number of blocks, of a width > 0")
        self.require(self.power > 0, "power", "a positive number")

    def module(self, classes: int) -> RuleModule:
        return AcceptanceRule(self)


class AcceptanceRule(RuleModule):
    """The module of `Acceptance`."""

    rule: Acceptance

    def __init__(self, rule: Acceptance) -> None:
        super().__init__(rule)
        self.enter = nn.Linear(4, rule.width)
        self.blocks = nn.ModuleList(nn.Linear(rule.width, rule.width) for _ in range(rule.layers))
        self.out = nn.Linear(rule.width, 2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def verdict(self, logits: Tensor) -> Tensor:
        """Logits of rejection and acceptance, (B, C) -> (B, 2). Gradients do not reach the logits."""
        x = self.enter(logit_statistics(logits.detach(), self.rule.power).to(self.enter.weight.dtype))
        for block in self.blocks:
            x = x + nn.functional.silu(block(x))
        return self.out(x)

    def score(self, logits: Tensor) -> Tensor:
        return torch.softmax(self.verdict(logits).float(), -1)[..., 1]

    def stops(self, accepted: Tensor) -> Tensor:
        """Whether a draft stops behind its last token. accepted: (B, T), the scores of its tokens -> (B,) of bool"""
        product = accepted[:, 1:].prod(-1)  # the first is drafted in any case
        return 1 - product > self.threshold
