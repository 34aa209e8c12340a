"""Sinkhorn routing: the plan is balanced, and inference has none."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from gatecc.ir.gates.choice import Choice
from gatecc.ir.gates.sinkhorn import transport_plan

Z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def test_rows_and_columns_of_the_plan() -> None:
    plan = transport_plan(torch.log_softmax(Z, -1), 50)
    torch.testing.assert_close(plan.sum(1), torch.ones(64))
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 8.0), rtol=0, atol=1e-4)
    assert (torch.softmax(Z, -1).sum(0) - 8).abs().max() > 0.5  # which plain softmax does not have


def test_training_uses_the_plan_and_eval_the_softmax() -> None:
    choice = Choice.parse("sinkhorn_topk(k=2, iters=50)")
    weights, indices = choice(Z, {}, True)
    top = transport_plan(torch.log_softmax(Z, -1), 50).topk(2, -1)
    assert torch.equal(indices, top.indices)
    torch.testing.assert_close(weights, top.values / top.values.sum(-1, keepdim=True))
    weights, indices = choice(Z, {}, False)
    top = Z.topk(2, -1)
    assert torch.equal(indices, top.indices)
    torch.testing.assert_close(weights, torch.softmax(top.values, -1))


def test_inference_has_no_sinkhorn_node() -> None:
    choice = Choice.parse("sinkhorn_topk(k=2, p=0.5)")
    named = choice.buffers(8)

    def nodes(training: bool) -> int:
        graph = make_fx(lambda z: choice(z, named, training))(Z).graph
        return sum("logsumexp" in str(n.target) for n in graph.nodes)

    assert nodes(False) == 0 < nodes(True) == 40


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 1 / 3, 0.75])
def test_the_fraction_of_steps(p: float) -> None:
    choice = Choice.parse(f"sinkhorn_topk(k=2, p={p})")
    named = choice.buffers(8)
    used: list[bool] = [bool(named["planned"])]
    for step in range(1, 1000):
        choice.advance(named, step)
        used.append(bool(named["planned"]))
    assert used[0]
    assert abs(sum(used) - 1000 * p) <= 1
    assert Choice.parse("sinkhorn_topk(k=2)").buffers(8) == {}


def test_steps_without_the_plan_are_plain() -> None:
    choice = Choice.parse("sinkhorn_topk(k=2, p=0.5)")
    weights, indices = choice(Z, {"planned": torch.tensor(False)}, True)
    wanted, at = choice(Z, {}, False)
    assert torch.equal(indices, at)
    torch.testing.assert_close(weights, wanted)
