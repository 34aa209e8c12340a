"""Ensembles: what trains the router of several whole models where the loss of the task does not: losses of members,
costs, sweeps and cluster centres."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.capture.signature import split_inputs
from gatecc.errors import ArgumentError, TrainingError
from gatecc.ir.gates.centres import Centres
from gatecc.passes.ensemble.chooser import Chooser
from gatecc.passes.ensemble.ensemble import Ensemble


@torch.no_grad()
def member_losses(ensemble: Ensemble, loss: Callable[[Any], Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The loss of each member on each sample, (B, E): every member runs on all samples of the call.

    ``loss`` takes a member's output and returns a loss for each sample, (B,). What a router of predicted losses learns
    (Tryage), and where the best member is, ``member_losses(...).argmin(-1)``. Raises ArgumentError for other shapes.
    """
    values = ensemble.outputs(ensemble.inputs.bind(args, kwargs), ensemble.members)
    found = [loss(values[name]) for name in ensemble.members]
    for name, each in zip(ensemble.members, found, strict=True):
        if each.dim() != 1:
            raise ArgumentError(
                "the loss is not one number for each sample",
                where=name,
                found=f"shape {tuple(each.shape)}",
                expected="(B,)",
                do='F.cross_entropy(..., reduction="none")',
            )
    return torch.stack(found, -1)


def expected_loss(logits: Tensor, losses: Tensor, costs: Tensor | None = None) -> Tensor:
    """mean_b Σ_e softmax(logits)_be (losses_be + costs_e): what a gate that draws one member would lose and pay.

    ``logits``: (B, E), from ``ensemble.logits``; ``losses``: (B, E), from `member_losses`, or 1 where a member errs;
    ``costs``: (E,), a trade-off included. TableDART's objective of accuracy and cost.
    """
    total = losses if costs is None else losses + costs
    return (torch.softmax(logits, -1) * total.to(logits.dtype)).sum(-1).mean()


@torch.no_grad()
def sweep(
    ensemble: Ensemble,
    batches: Sequence[Any],
    score: Callable[[list[Any]], float],
    thresholds: Sequence[float],
    temperatures: Sequence[float] = (),
) -> tuple[float, float, float]:
    """Find the threshold and temperature of a router with the best score on validation data, and set them.

    ``batches``: inputs as in `transform`; members run once on each. ``score`` takes the ensemble's outputs, one per
    batch, and returns what should be large. The first of equal ones wins; without ``temperatures`` that of the router
    stays. Returns threshold, temperature (NaN if the router has none) and score.

    Raises TrainingError for a router without a threshold, ArgumentError if there is nothing to try.
    """
    chooser = _router(ensemble)
    buffers = dict(chooser.named_buffers())
    if "threshold" not in buffers or (temperatures and "temperature" not in buffers):
        raise TrainingError(
            "the router of this ensemble has no threshold to sweep", found=str(chooser.router), expected="cosmo"
        )
    if not batches or not thresholds:
        raise ArgumentError("a sweep needs batches and thresholds", found=f"{len(batches)} and {len(thresholds)}")
    known = [_outputs(ensemble, batch) for batch in batches]
    threshold, temperature = buffers["threshold"], buffers.get("temperature", torch.tensor(float("nan")))
    best = (float(threshold), float(temperature), float("-inf"))
    for t, T in itertools.product(thresholds, temperatures or [float(temperature)]):  # the paper's letter
        threshold.fill_(t)
        temperature.fill_(T)
        if (reached := score([ensemble.combined(dict(values)) for values in known])) > best[2]:
            best = (t, T, reached)
    threshold.fill_(best[0])
    temperature.fill_(best[1])
    return best


@torch.no_grad()
def update_centres(ensemble: Ensemble, *args: Any, decay: float = 0.99, iterations: int = 3, **kwargs: Any) -> Tensor:
    """Move cluster centres towards the samples of a call; returns the coefficients (B, E) of the last iteration.

    In each iteration c = softmax(cos(x, μ) / T) over the centres, and μ becomes the mean of x weighted by c; then the
    router's centres are decay μ_old + (1 - decay) μ. Centres that no sample leans to stay. Raises TrainingError if the
    router has no centres.
    """
    chooser = _router(ensemble)
    scorer = chooser.spec.scorer
    if not isinstance(scorer, Centres):
        raise TrainingError(
            "the router of this ensemble has no cluster centres", found=str(chooser.router), expected="adaptdhm"
        )
    values = ensemble.outputs(ensemble.inputs.bind(args, kwargs), chooser.reads)
    x = F.normalize(chooser.read_rows(*ensemble.given(values, chooser)).float(), dim=-1)
    centres = chooser.get_parameter("weight")
    moved = F.normalize(centres.float(), dim=-1)
    coefficients = torch.softmax(x @ moved.mT / scorer.T, -1)
    for _ in range(iterations):
        coefficients = torch.softmax(x @ moved.mT / scorer.T, -1)
        weight = coefficients.sum(0).unsqueeze(-1)
        moved = torch.where(weight > 1e-6, F.normalize(coefficients.mT @ x, dim=-1), moved)
    centres.copy_(decay * F.normalize(centres.float(), dim=-1) + (1 - decay) * moved)
    return coefficients


def _outputs(ensemble: Ensemble, batch: Any) -> dict[str, Any]:
    values = ensemble.inputs.bind(*split_inputs(batch))
    return ensemble.outputs(values, [*ensemble.members, *_router(ensemble).reads])


def _router(ensemble: Ensemble) -> Chooser:
    if (chooser := ensemble.chooser) is None:
        raise TrainingError("the ensemble has no router", do='gatecc.transform(ensemble, "cosmo", inputs)')
    return chooser
