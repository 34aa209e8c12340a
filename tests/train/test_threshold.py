"""Thresholds from costs, tracked, and moved."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateShape, GateSpec, SourceShape
from gatecc.train import ThresholdTracker, move_threshold, threshold_from_costs


def test_the_threshold_of_costs_is_where_both_cost_the_same() -> None:
    assert threshold_from_costs(1, 1) == 0.5
    t = threshold_from_costs(1, 3)
    assert (1 - t) * 1 == pytest.approx(t * 3)
    with pytest.raises(ArgumentError):
        threshold_from_costs(0, 0)


@pytest.mark.parametrize("metric", ["rate", "sensitivity", "specificity"])
def test_tracking_converges_to_the_quantile(metric: Literal["rate", "sensitivity", "specificity"]) -> None:
    """p is uniform, and the labels say nothing of it: the rate above t is 1 - t whatever the label."""
    tracker = ThresholdTracker(metric, 0.8, step=0.5)
    for _ in range(500):
        p = torch.rand(64)
        tracker.update(p, (torch.rand(64) > 0.5).float())
    assert tracker.t == pytest.approx(0.8 if metric == "specificity" else 0.2, abs=0.03)


def test_tracking_refuses_what_it_cannot_know() -> None:
    with pytest.raises(ArgumentError, match="labels"):
        ThresholdTracker("sensitivity", 0.8).update(torch.rand(3))
    with pytest.raises(ArgumentError, match="rate"):
        ThresholdTracker("rate", 1.5)


def test_a_moved_gate_switches_at_the_new_probability() -> None:
    spec = GateSpec("x", "linear", "channel", "threshold(0.5)", "frozen", "random(std=1)")
    gate = spec.build(GateShape("bc", {"c": 5}, (SourceShape("bc", 3),))).eval()
    ones, x = torch.ones(200, 5), torch.randn(200, 3)
    p = torch.sigmoid(gate.score(ones, x).x)
    move_threshold(gate, 0.5, 0.8)
    assert torch.equal(gate(ones, x), (p > 0.8).float())
    move_threshold(gate, 0.8, 0.3)
    assert torch.equal(gate(ones, x), (p > 0.3).float())
    with pytest.raises(ArgumentError, match="activation=threshold"):
        move_threshold(GateSpec("x", granularity="channel").build(gate.shape), 0.5, 0.6)
