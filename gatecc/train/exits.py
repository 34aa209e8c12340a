"""Exits: what their training and calibration read, and the training of exits with learned gates (JEI-DNN)."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gatecc.capture.flops import counted
from gatecc.capture.modes import in_eval
from gatecc.errors import ArgumentError, TrainingError
from gatecc.passes.exit.rule import NEVER, CalibratedRule, LearnedRule, RuleModule
from gatecc.train.batches import Batch, Stream, call_of, device_of
from gatecc.train.labels import gate_bce
from gatecc.train.losses import kld

_HEAD = re.compile(r"(^|\.)exit_head(_\d+)?\.")
_ALWAYS = -1.0
IGNORED = -100  # as in torch's cross entropy
Labelled = tuple[Batch, Tensor]


def exits(model: nn.Module) -> list[RuleModule]:
    """The rules of a model's exits, in order of depth; their ``threshold`` may be set. Raises TrainingError if it has
    none."""
    found = sorted((m for m in model.modules() if isinstance(m, RuleModule)), key=lambda m: m.place)
    if not found:
        raise TrainingError(
            "the model has no exits", where=type(model).__name__, do='gatecc.transform(model, "jei-dnn", inputs)'
        )
    return found


def exit_logits(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The logits of every exit, and behind them the model's own, (B, C) each, for all samples: nobody leaves. Of a
    model of tokens they are (B, N, C).

    ``batch`` as for `heal`. Gradients reach whatever trains.
    """
    rules = exits(model)
    found: dict[int, Tensor] = {}

    def hook(rule: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        found[cast("RuleModule", rule).place] = args[0]

    args, kwargs = call_of(batch, device_of(model))
    with _thresholds(rules, [NEVER] * len(rules)):
        hooks = [rule.register_forward_hook(hook) for rule in rules]
        try:
            out = model(*args, **kwargs)
        finally:
            for one in hooks:
                one.remove()
    early = [found[rule.place] for rule in rules]
    shape = early[0].shape
    leaves = [x for x in pytree.tree_leaves(_plain(out)) if isinstance(x, Tensor) and x.shape == shape]
    return [*early, leaves[0]]


def labelled_logits(model: nn.Module, batch: Batch, labels: Tensor) -> tuple[list[Tensor], Tensor]:
    """`exit_logits` and labels of all who have one, (S, C) each and (S,): samples, or tokens, for which labels (B, N)
    of -100 say that there is none."""
    logits = exit_logits(model, batch)
    labels = labels.to(logits[0].device)
    if labels.shape != logits[0].shape[:-1]:
        raise ArgumentError(
            "the labels do not belong to the logits",
            found=f"labels {tuple(labels.shape)}",
            expected=str(tuple(logits[0].shape[:-1])),
        )
    if labels.dim() == 1:
        return logits, labels
    known = labels != IGNORED
    return [z[known] for z in logits], labels[known]


def exit_costs(model: nn.Module, batch: Batch) -> Tensor:
    """What leaving at each exit costs, as a share of leaving at none, (L + 1,): FLOPs of runs in which the first sample
    of the batch leaves there. In a model of tokens all of its tokens do, so that nobody reads their keys and values in
    the layers behind: a step of a decoder computes these as well."""
    rules = exits(model)
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: x[:1] if x.dim() else x, call_of(batch, device_of(model)))
    flops: list[int] = []
    for at in range(len(rules) + 1):
        with _thresholds(rules, [_ALWAYS if i == at else NEVER for i in range(len(rules))]), in_eval(model):
            flops.append(counted(lambda: model(*args, **kwargs))[1])
    return torch.tensor(flops, dtype=torch.float64) / max(flops[-1], 1)


def exit_labels(losses: Tensor, costs: Tensor, trade: float) -> Tensor:
    """Whether a sample should have left by each exit: 1 from argmin_l losses_l + trade * costs_l on.

    losses: (B, L + 1), costs: (L + 1,) -> (B, L). Along the exits they never fall.
    """
    best = (losses + trade * costs.to(losses)).argmin(-1, keepdim=True)
    return (torch.arange(losses.size(-1) - 1, device=losses.device) >= best).to(losses.dtype)


def exit_probabilities(gates: Tensor) -> Tensor:
    """P(leave at l) = g_l Π_(k<l) (1 - g_k), the rest at the end. Gate logits (B, L) -> (B, L + 1)"""
    log_stays = F.logsigmoid(-gates).cumsum(-1)
    before = F.pad(log_stays, (1, 0))
    return torch.cat([(before[:, :-1] + F.logsigmoid(gates)).exp(), before[:, -1:].exp()], -1)


@dataclass(frozen=True)
class Fitted:
    """How training of exits went: mean losses of the heads, one for each exit, and of the gates, per report."""

    heads: tuple[tuple[float, ...], ...]
    gates: tuple[float, ...]


def fit_exits(
    model: nn.Module,
    data: Iterable[Labelled],
    *,
    steps: int,
    trade: float = 0.5,
    costs: Tensor | None = None,
    warmup: float = 0.4,
    period: int = 10,
    lr: float = 2e-3,
    balance: float = 5.0,
    distill: float = 0.0,
) -> Fitted:
    """Train exits, and nothing else of the model, in turn with their gates if these are learned (JEI-DNN).

    ``data``: pairs of a batch, as for `heal`, and labels (B,), for a model of tokens (B, N), the next tokens, -100
    where there is none. For the share ``warmup`` of the steps the heads learn from their mean cross entropy. Then
    ``period`` steps of heads, each weighted by the probability that a sample leaves there, and as many of gates take
    turns: a gate's label is 1 from the exit on at which the cross entropy plus ``trade`` times the cost (``costs``:
    (L + 1,), else `exit_costs`) is least; positives count as negatives per positive, at most ``balance`` times. Heads
    also learn from the model's own logits, ``distill`` times the distance (`kld`); and where exits write to the stream,
    the model's loss counts as one more head's.

    Gates that were never to leave leave from probability 1/2 on afterwards; other rules keep their thresholds, see
    `calibrate`. The model's own parameters and their ``requires_grad`` stay.
    """
    if steps < 1 or not 0 <= warmup <= 1 or period < 1:
        raise ArgumentError(
            "exits cannot be trained like this",
            found=f"steps={steps}, warmup={warmup}, period={period}",
            expected="steps and period >= 1, warmup in [0, 1]",
        )
    work, stream = _Work(model, lr, trade, balance, costs, distill), Stream(data)
    with in_eval(model), only(model, [*work.heads, *work.gates]):  # dropout and statistics are the frozen model's
        for step in range(steps):
            late = step - round(warmup * steps)
            batch, labels = stream.next()
            work.step(batch, labels, weighted=late >= 0, gates=late >= 0 and (late // period) % 2 == 0)
    for rule in work.learned:
        if float(rule.threshold) > 1:
            set_thresholds([rule], [0.5])
    return Fitted(tuple(work.of_heads), tuple(work.of_gates))


class _Work:
    """What steps of `fit_exits` share."""

    def __init__(
        self, model: nn.Module, lr: float, trade: float, balance: float, costs: Tensor | None, distill: float
    ) -> None:
        self.model, self.trade, self.balance, self.costs, self.distill = model, trade, balance, costs, distill
        self.rules = exits(model)
        self.learned = [rule for rule in self.rules if isinstance(rule, LearnedRule)]
        if self.learned and len(self.learned) != len(self.rules):
            raise TrainingError(
                "some exits have learned gates and some have not", do="train models with one kind of rule"
            )
        self.heads = [p for name, p in model.named_parameters() if _HEAD.search(name)]
        self.gates = [p for rule in self.learned for p in rule.parameters()]
        groups = [{"params": group, "lr": rate} for group, rate in ((self.heads, lr), (self.gates, 10 * lr)) if group]
        if not groups:
            raise TrainingError(
                "nothing of the exits trains", found="heads that are the model's own", expected="tail() or pooled()"
            )
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.of_heads: list[tuple[float, ...]] = []
        self.of_gates: list[float] = []

    def step(self, batch: Batch, labels: Tensor, *, weighted: bool, gates: bool) -> None:
        """One step of the heads, or where there are learned gates and it is their turn, of these."""
        if self.costs is None and self.learned:
            self.costs = exit_costs(self.model, batch)
        logits, labels = labelled_logits(self.model, batch, labels)
        losses = cross_entropies(logits, labels)
        if self.learned and gates:
            loss = self._gates(logits, losses.detach())
            self.of_gates.append(float(loss.detach()))
        else:
            loss = self._heads(logits, losses, weighted)
            self.of_heads.append(tuple(losses[:, :-1].detach().mean(0).tolist()))
        self.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:  # a gate's turn, of heads that are the model's own, leaves nothing to a head's
            loss.backward()
            self.optimizer.step()

    def _logits(self, logits: Sequence[Tensor]) -> Tensor:
        return torch.stack([rule.logit(z) for rule, z in zip(self.learned, logits, strict=False)], -1).float()

    def _gates(self, logits: Sequence[Tensor], losses: Tensor) -> Tensor:
        assert self.costs is not None
        wanted, z = exit_labels(losses, self.costs.to(losses.device), self.trade), self._logits(logits)
        each: list[Tensor] = []
        for logit, label in zip(z.unbind(-1), wanted.unbind(-1), strict=True):
            mixed = bool((label < 1).any())  # where everybody should leave, positives would weigh nothing
            each.append(gate_bce(logit, label, balance=self.balance if mixed else None))
        return torch.stack(each).mean()

    def _heads(self, logits: Sequence[Tensor], losses: Tensor, weighted: bool) -> Tensor:
        *early, final = logits
        if self.distill:
            far = [kld(z, final.detach()) for z in early]
            aside = self.distill * torch.stack(far).mean()
        else:
            aside = losses.new_zeros(())
        written = losses if final.requires_grad else losses[:, :-1]
        if not (weighted and self.learned):
            return written.mean() + aside
        probabilities = exit_probabilities(self._logits(logits).detach())
        return (probabilities[:, : written.size(-1)] * written).sum(-1).mean() + aside


@contextmanager
def only(model: nn.Module, trained: Sequence[nn.Parameter]) -> Generator[None]:
    """Nothing but these parameters has a gradient for a while."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, *_ in before:
            p.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
        yield
    finally:
        for p, wanted, gradient in before:
            p.requires_grad_(wanted)
            p.grad = gradient


@torch.no_grad()
def fit_exemplars(model: nn.Module, data: Iterable[Labelled]) -> None:
    """Fill the exemplars of every "calibrated" rule from data that the model was not trained on.

    Raises TrainingError without such a rule, ArgumentError if there are too few samples.
    """
    rules = exits(model)
    if not any(isinstance(rule, CalibratedRule) for rule in rules):
        raise TrainingError("no exit keeps exemplars", expected="Exit(..., rule='calibrated')")
    with in_eval(model):
        found = [labelled_logits(model, batch, labels) for batch, labels in data]
    labels = torch.cat([y for _, y in found]) if found else torch.empty(0)
    for at, rule in enumerate(rules):
        if not isinstance(rule, CalibratedRule):
            continue
        if len(labels) < rule.rule.exemplars:
            raise ArgumentError(
                "too few samples to be exemplars", found=str(len(labels)), expected=f"{rule.rule.exemplars} or more"
            )
        rule.fit(torch.cat([z[at] for z, _ in found]), labels.to(rule.right.device))


def cross_entropies(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """L + 1 logits (B, C) and labels (B,) -> (B, L + 1), in float32"""
    labels = labels.to(logits[0].device)
    return torch.stack([F.cross_entropy(z.float(), labels, reduction="none") for z in logits], -1)


@contextmanager
def _thresholds(rules: Sequence[RuleModule], values: Sequence[float]) -> Generator[None]:
    """Other thresholds for a while."""
    before = [float(rule.threshold) for rule in rules]
    set_thresholds(rules, values)
    try:
        yield
    finally:
        set_thresholds(rules, before)


@torch.no_grad()
def set_thresholds(rules: Sequence[RuleModule], values: Sequence[float]) -> None:
    """Set the thresholds of exits; captured graphs follow."""
    for rule, value in zip(rules, values, strict=True):
        rule.threshold.fill_(value)


def _plain(out: Any) -> Any:
    """An output with what pytree does not know (a ModelOutput is a dict)."""
    return dict(out) if isinstance(out, dict) else out
