"""Calibrate: thresholds of a model's exits from labelled data, and what accuracy costs with others."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gatecc.capture.modes import in_eval
from gatecc.errors import ArgumentError, MissingPackageError
from gatecc.passes.exit.rule import NEVER
from gatecc.train.exits import Labelled, cross_entropies, exit_costs, exits, labelled_logits, set_thresholds


@dataclass(frozen=True)
class Operating:
    """What certain thresholds give on the calibration data. ``cost``: the mean, as a share of leaving at none;
    ``shares``: of the samples, how many leave at each exit, and last how many at none."""

    thresholds: tuple[float, ...]
    cost: float
    accuracy: float
    loss: float
    shares: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Calibration:
    """``chosen`` is set on the model. ``curve``: the best accuracy for each cost that thresholds reach; ``oracle``: the
    best that a choice of exits reaches. ``scores``: (S, L), ``losses``, ``right``: (S, L + 1), ``costs``: (L + 1,).
    """

    chosen: Operating
    curve: tuple[Operating, ...]
    oracle: tuple[Operating, ...]
    scores: Tensor
    losses: Tensor
    right: Tensor
    costs: Tensor

    def at(self, thresholds: Sequence[float]) -> Operating:
        """What these thresholds give."""
        t = torch.tensor(thresholds, dtype=self.scores.dtype)
        leaves = torch.cat([self.scores >= t, torch.ones(len(self.scores), 1, dtype=torch.bool)], -1)
        return self.leaving(leaves.int().argmax(-1), tuple(map(float, thresholds)))

    def leaving(self, where: Tensor, thresholds: tuple[float, ...] = ()) -> Operating:
        """What it gives if each sample leaves at the exit of this number. where: (S,)"""
        at = where.unsqueeze(-1)
        shares = torch.bincount(where, minlength=len(self.costs)).double() / len(where)
        accuracy = float(self.right.gather(-1, at).double().mean())
        loss = float(self.losses.gather(-1, at).double().mean())
        return Operating(thresholds, float(shares @ self.costs), accuracy, loss, tuple(shares.tolist()))

    def __str__(self) -> str:
        """A table: the curve, the oracle at most that dear, and what was chosen."""
        rows = ["cost   accuracy  oracle  samples that leave at each exit, and at none"]
        for point in (*self.curve, self.chosen):
            best = max((o.accuracy for o in self.oracle if o.cost <= point.cost + 1e-9), default=float("nan"))
            shares = " ".join(f"{share:.0%}" for share in point.shares)
            mark = " <- chosen" if point is self.chosen else ""
            rows.append(f"{point.cost:.3f}  {point.accuracy:.4f}    {best:.4f}  {shares}{mark}")
        return "\n".join(rows)

    def draw(self, path: str | Path) -> None:
        """Write the curve and its oracle as a picture. Raises MissingPackageError without matplotlib."""
        try:
            matplotlib: Any = importlib.import_module("matplotlib")
            figure_of: Any = importlib.import_module("matplotlib.figure").Figure
        except ImportError as e:
            raise MissingPackageError(
                "matplotlib draws the curve",
                found=str(e),
                do="pip install 'gatecc[viz]'; print(calibration) is a table",
            ) from e
        with matplotlib.rc_context():
            figure = figure_of(figsize=(6, 4), layout="constrained")
            axes = figure.add_subplot()
            for points, name, style in ((self.oracle, "oracle", "--"), (self.curve, "thresholds", "-")):
                axes.plot(
                    [p.cost for p in points], [p.accuracy for p in points], style, label=name, drawstyle="steps-post"
                )
            axes.plot([self.chosen.cost], [self.chosen.accuracy], "o", label="chosen")
            axes.set(xlabel="mean FLOPs, of those without an exit", ylabel="accuracy")
            axes.legend()
            figure.savefig(path)


def calibrate(
    model: nn.Module,
    data: Iterable[Labelled],
    *,
    by: Literal["accuracy", "cost", "loss", "quantile"] = "accuracy",
    drop: float = 0.0,
    budget: float = 0.5,
    trade: float = 0.5,
    share: float | Sequence[float] = 0.5,
    steps: int = 40,
) -> Calibration:
    """Find and set the thresholds of a model's exits on labelled data that it was not trained on.

    ``data``: pairs of a batch, as for `heal`, and labels (B,), for a model of tokens (B, N), the next tokens, -100
    where there is none. Costs are FLOPs of runs (`exit_costs`). ``by``:

    - "accuracy": the cheapest whose accuracy is at most ``drop`` below that without exits.
    - "cost": the most accurate whose mean cost is at most ``budget`` of that without exits.
    - "loss": the least mean of cross entropy + ``trade`` * cost.
    - "quantile": at each exit the surest ``share`` leaves of those who reach it (one number, or one for each exit).

    The first three search, ``steps`` values of each threshold. Raises TrainingError without exits, ArgumentError for
    settings out of range or if there are no samples.
    """
    rules = exits(model)
    shares = [share] * len(rules) if isinstance(share, (int, float)) else list(share)
    if len(shares) != len(rules) or not all(0 <= s <= 1 for s in shares) or steps < 1 or trade < 0:
        raise ArgumentError(
            "thresholds cannot be found like this",
            found=f"share={share}, steps={steps}, trade={trade}",
            expected=f"shares in [0, 1], one or {len(rules)}; steps >= 1; trade >= 0",
        )
    if by not in ("accuracy", "cost", "loss", "quantile"):
        raise ArgumentError(
            "unknown way to choose thresholds", found=repr(by), expected="accuracy, cost, loss, quantile"
        )
    measured = _measured(model, data)
    points = _candidates(measured, steps)
    ends = measured.at([NEVER] * len(rules))
    if by == "quantile":
        chosen = measured.at(_by_shares(measured.scores, shares))
    elif by == "loss":
        chosen = _descend(measured, min(points, key=_value(trade)), trade, steps)
    elif by == "cost":
        within = [p for p in points if p.cost <= budget + 1e-9]
        if not within:
            raise ArgumentError(
                "no thresholds are as cheap as that",
                found=f"budget={budget}, and leaving at the first exit costs {float(measured.costs[0]):.3f}",
                do="exit earlier, or allow more",
            )
        chosen = max(within, key=lambda p: (p.accuracy, -p.loss))
    else:
        fit = [p for p in points if p.accuracy >= ends.accuracy - drop - 1e-9]
        chosen = min(fit, key=lambda p: (p.cost, p.loss))
    set_thresholds(rules, chosen.thresholds)
    return Calibration(
        chosen,
        _front([*points, chosen]),
        _oracle(measured),
        measured.scores,
        measured.losses,
        measured.right,
        measured.costs,
    )


def geometric_shares(q: float, exits: int) -> list[float]:
    """The share that leaves at each exit, of the samples that reach it, if q^k of all leave at exit k, up to a factor,
    the last being the model's own (Dyn-Perceiver)."""
    if q <= 0 or exits < 1:
        raise ArgumentError("no such shares", found=f"q={q}, exits={exits}", expected="q > 0, exits >= 1")
    powers = [q**k for k in range(exits + 1)]
    return [powers[k] / sum(powers[k:]) for k in range(exits)]


@torch.no_grad()
def _measured(model: nn.Module, data: Iterable[Labelled]) -> Calibration:
    rules = exits(model)
    scores, losses, right = list[Tensor](), list[Tensor](), list[Tensor]()
    costs: Tensor | None = None
    with in_eval(model):
        for batch, labels in data:
            logits, labels = labelled_logits(model, batch, labels)
            costs = exit_costs(model, batch) if costs is None else costs
            scores.append(torch.stack([r.score(z.float()) for r, z in zip(rules, logits, strict=False)], -1).cpu())
            losses.append(cross_entropies(logits, labels).cpu())
            right.append(torch.stack([z.argmax(-1) == labels.to(z.device) for z in logits], -1).cpu())
    if costs is None or not sum(map(len, scores)):
        raise ArgumentError("there are no samples to calibrate on", expected="pairs of a batch and labels (B,)")
    nothing = Operating((), 1.0, 0.0, 0.0, ())
    return Calibration(nothing, (), (), torch.cat(scores), torch.cat(losses), torch.cat(right), costs)


def _by_shares(scores: Tensor, shares: Sequence[float]) -> list[float]:
    """Thresholds at which these shares leave, each of the samples that reach the exit."""
    here, found = torch.ones(len(scores), dtype=torch.bool), list[float]()
    for column, share in zip(scores.unbind(-1), shares, strict=True):
        found.append(_quantile(column[here], share))
        here = here & ~(column >= found[-1])
    return found


def _quantile(scores: Tensor, share: float) -> float:
    """The score from which on a share of the samples leaves, halfway to the next."""
    count = round(share * len(scores))
    if not count:
        return NEVER
    if count == len(scores):
        return 0.0
    ordered = scores.double().sort(descending=True).values
    return float((ordered[count - 1] + ordered[count]) / 2)


def _candidates(measured: Calibration, steps: int) -> list[Operating]:
    """Points of three families, the same share at every exit, one threshold for all, and geometric shares of all; and
    what threshold by threshold is found from the best of them."""
    exits_ = measured.scores.size(-1)
    shares = [i / steps for i in range(steps + 1)]
    found = [measured.at(_by_shares(measured.scores, [s] * exits_)) for s in shares]
    found += [measured.at([_quantile(measured.scores.flatten(), s)] * exits_) for s in shares]
    for q in torch.logspace(-1, 1, 33).tolist():
        found.append(measured.at(_by_shares(measured.scores, geometric_shares(q, exits_))))
    for trade in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        found.append(_descend(measured, min(found, key=_value(trade)), trade, steps))
    return found


def _value(trade: float) -> Any:
    return lambda p: p.loss + trade * p.cost


def _descend(measured: Calibration, start: Operating, trade: float, steps: int) -> Operating:
    """One threshold after the other moved to where loss + trade * cost is least, until none moves."""
    best = start
    for _ in range(8):
        before = best
        for at in range(len(best.thresholds)):
            column = measured.scores[:, at]
            for i in range(steps + 1):
                t = _quantile(column, i / steps)
                tried = measured.at((*best.thresholds[:at], t, *best.thresholds[at + 1 :]))
                best = min(best, tried, key=_value(trade))
        if best is before:
            break
    return best


def _front(points: Sequence[Operating]) -> tuple[Operating, ...]:
    """Those than which no other is both as cheap and more accurate, the cheapest first."""
    kept: list[Operating] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if not kept or point.accuracy > kept[-1].accuracy:
            kept.append(point)
    return tuple(kept)


def _oracle(measured: Calibration) -> tuple[Operating, ...]:
    """Leaving at the first exit that is right, dear ones last, part by part: the others leave at once."""
    right, costs = measured.right, measured.costs
    first = torch.where(right.any(-1), right.int().argmax(-1), 0)
    points: list[Operating] = []
    for deepest in range(len(costs)):
        shallow = torch.where(first < deepest, first, torch.zeros_like(first))
        here = (first == deepest).nonzero().squeeze(-1)
        for part in range(21 if deepest else 1):
            where = shallow.clone()
            where[here[: round(part / 20 * len(here))]] = deepest
            points.append(measured.leaving(where))
    return _front(points)
