"""Zoom: training of what decides who looks again, and where (Q-Zoom)."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gatecc.capture.modes import in_eval
from gatecc.errors import ArgumentError, TrainingError
from gatecc.passes.zoom import NEVER, Twig
from gatecc.passes.zoom import TwoScales as TwoScales
from gatecc.train.batches import Batch, Stream, call_of, device_of
from gatecc.train.exits import only
from gatecc.train.labels import gate_bce

_ALWAYS = -1.0


class Passes(NamedTuple):
    """What both passes make of a batch: logits (B, C) of the first alone and of those that look again, and the logit of
    looking again (B,)."""

    coarse: Tensor
    fine: Tensor
    zooms: Tensor


def twig_of(model: nn.Module) -> Twig:
    """The twig of a model; its ``threshold`` may be set. Raises TrainingError if it has none, or several."""
    found = [m for m in model.modules() if isinstance(m, Twig)]
    if len(found) != 1:
        raise TrainingError(
            "one twig decides who looks again",
            where=type(model).__name__,
            found=f"{len(found)} twigs",
            do='gatecc.transform(model, "q-zoom", inputs)',
        )
    return found[0]


def passes(model: nn.Module, batch: Batch) -> Passes:
    """Both passes of all samples, and whether they would look again. Gradients reach whatever trains."""
    twig, seen = twig_of(model), list[Tensor]()
    args, kwargs = call_of(batch, device_of(model))

    def run(threshold: float) -> Tensor:
        with _at(twig, threshold):
            return next(x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor))

    hook = twig.register_forward_hook(lambda module, given, result: seen.append(given[0]))
    try:
        fine = run(_ALWAYS)
    finally:
        hook.remove()
    with torch.no_grad():
        coarse = run(NEVER)
    return Passes(coarse, fine, twig.looked(seen[0])[0])


def fit_zoom(
    model: nn.Module,
    data: Iterable[tuple[Batch, Tensor]],
    *,
    steps: int,
    lr: float = 1e-3,
    balance: float = 5.0,
    threshold: float = 0.5,
) -> list[float]:
    """Train the twig, and nothing else of the model; the loss of each step.

    ``data``: pairs of a batch, as for `heal`, and labels (B,). The gate's label is 1 where the first pass is wrong and
    the second right (positives count as negatives per positive, at most ``balance`` times); the region learns from the
    cross entropy of the second pass, through the places at which the image is read. A twig that let nobody zoom lets
    them from ``threshold`` on afterwards.
    """
    if steps < 1 or not 0 <= threshold <= 1:
        raise ArgumentError(
            "a twig cannot be trained like this",
            found=f"steps={steps}, threshold={threshold}",
            expected="steps >= 1, threshold in [0, 1]",
        )
    twig, stream, losses = twig_of(model), Stream(data), list[float]()
    optimizer = torch.optim.AdamW(twig.parameters(), lr=lr, weight_decay=0.0)
    with in_eval(model), only(model, list(twig.parameters())):
        for _ in range(steps):
            batch, labels = stream.next()
            found = passes(model, batch)
            labels = labels.to(found.fine.device)
            right = (found.fine.argmax(-1) == labels) & (found.coarse.argmax(-1) != labels)
            loss = F.cross_entropy(found.fine.float(), labels)
            loss = loss + gate_bce(found.zooms.float(), right.float(), balance=balance)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    if float(twig.threshold) > 1:
        twig.threshold.fill_(threshold)
    return losses


@contextmanager
def _at(twig: Twig, threshold: float) -> Generator[None]:
    before: Any = twig.threshold.clone()
    twig.threshold.fill_(threshold)
    try:
        yield
    finally:
        twig.threshold.copy_(before)
