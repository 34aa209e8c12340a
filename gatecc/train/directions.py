"""Directions in hidden states: what a linear probe reads, and the difference of two means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.errors import ArgumentError


def probe(hidden: Tensor, labels: Tensor, *, decay: float = 1e-3, steps: int = 100) -> tuple[float, ...]:
    """The direction of a logistic probe: w of sigmoid(w h + b), fitted to labels of 0 and 1, with a small penalty.

    hidden: (N, C), labels: (N,). The result is what `model-surgery` takes as ``direction``. Raises ArgumentError for
    labels of one kind, or other shapes.
    """
    x, y = _checked(hidden, labels)
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    z = (x - mean) / deviation
    w = torch.zeros(x.size(1) + 1, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(z @ w[:-1] + w[-1], y) + decay * w[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return tuple((w.detach()[:-1] / deviation).float().tolist())


def mean_difference(hidden: Tensor, labels: Tensor) -> tuple[float, ...]:
    """The unit vector from the mean of those labelled 0 to the mean of those labelled 1. hidden: (N, C), labels: (N,).

    Raises ArgumentError for labels of one kind, other shapes, or equal means.
    """
    x, y = _checked(hidden, labels)
    difference = x[y == 1].mean(0) - x[y == 0].mean(0)
    length = difference.norm()
    if not float(length):
        raise ArgumentError("there is no direction between two equal means", expected="hidden states that differ")
    return tuple((difference / length).float().tolist())


def _checked(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    kinds = set(labels.tolist()) if labels.dim() == 1 else set[float]()
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1] or kinds != {0, 1}:
        raise ArgumentError(
            "a direction lies between two kinds of hidden states",
            found=f"hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)} of {sorted(kinds)[:5]}",
            expected="hidden (N, C), and a label of 0 or 1 for each, both of which occur",
        )
    return hidden.detach().double(), labels.to(hidden.device).double()
