"""Where to put the threshold of a gate: from the costs of its errors, or by tracking a rate that it should keep."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateModule
from gatecc.ir.gates.activation import Threshold


def threshold_from_costs(false_alarm: float, miss: float) -> float:
    """The probability above which acting costs less than not acting: C_fa / (C_fa + C_miss) (PRISM)."""
    if false_alarm < 0 or miss < 0 or false_alarm + miss == 0:
        raise ArgumentError("costs are positive", found=f"{false_alarm}, {miss}", expected="two numbers >= 0, one > 0")
    return false_alarm / (false_alarm + miss)


class ThresholdTracker:
    """A threshold that follows a target (S-aware gating, ASkDAgger): ``t`` moves a little after each batch.

    metric: "rate", the fraction of units that are on; "sensitivity", of those that should be on; "specificity", the
    fraction off of those that should be off. On stationary scores t converges to the quantile that meets the target.
    """

    def __init__(
        self,
        metric: Literal["rate", "sensitivity", "specificity"],
        target: float,
        *,
        start: float = 0.5,
        step: float = 0.05,
    ) -> None:
        if metric not in ("rate", "sensitivity", "specificity") or not 0 < target < 1:
            raise ArgumentError(
                "cannot track this",
                found=f"metric={metric!r}, target={target}",
                expected="rate, sensitivity or specificity; 0 < target < 1",
            )
        self.metric = metric
        self.target = target
        self.step = step
        self.t = start
        self._updates = 0

    def update(self, p: Tensor, label: Tensor | None = None) -> float:
        """Read probabilities p of a batch and, except for "rate", labels of the same shape; returns the new t."""
        chosen = self._chosen(p, label)
        if not chosen.numel():
            return self.t
        self._updates += 1
        on = float((chosen > self.t).to(torch.float32).mean())
        wanted = 1 - self.target if self.metric == "specificity" else self.target
        # Robbins and Monro: steps that shrink, but whose sum has no bound.
        self.t = min(1.0, max(0.0, self.t + self.step * (on - wanted) / math.sqrt(self._updates)))
        return self.t

    def _chosen(self, p: Tensor, label: Tensor | None) -> Tensor:
        if self.metric == "rate":
            return p.flatten()
        if label is None:
            raise ArgumentError(f"{self.metric} is known from labels only", expected="update(p, label)")
        return p[label > 0.5] if self.metric == "sensitivity" else p[label <= 0.5]


@torch.no_grad()
def move_threshold(gate: GateModule, old: float, new: float) -> None:
    """Make a gate that switches at probability ``old`` switch at ``new``, through its bias: captured graphs follow.

    For σ(z + c) > old is σ(z) > new if c = logit(old) - logit(new).

    Raises ArgumentError for a gate without threshold or bias, or probabilities outside (0, 1).
    """
    if not isinstance(gate.activation, Threshold) or "bias" not in dict(gate.named_parameters(recurse=False)):
        raise ArgumentError("this gate has no threshold to move", found=str(gate.spec), expected="activation=threshold")
    if not (0 < old < 1 and 0 < new < 1):
        raise ArgumentError("a threshold is a probability", found=f"{old}, {new}", expected="between 0 and 1")
    gate.get_parameter("bias").add_(_logit(old) - _logit(new))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
