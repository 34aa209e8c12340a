"""Recipes of routers: what their papers say, by hand."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.ir.gates.sinkhorn import transport_plan
from gatecc.ir.router import Router
from gatecc.recipes import samples
from gatecc.train import routing


def router(model: nn.Module) -> Router:
    return next(found for _, found in routing.routers(model))


def state(model: nn.Module) -> Any:
    """The parameters of the first routed layer."""
    return next(cast("Any", m) for _, m in model.named_modules() if hasattr(m, "router"))


def run(mlp: Any, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The experts by a loop. x: (T, d)"""
    y = torch.zeros_like(x)
    act = {"gelu": nn.functional.gelu, "relu": torch.relu, "silu": nn.functional.silu}[mlp.experts.activation]
    for t, xt in enumerate(x):
        for w, e in zip(weights[t], indices[t], strict=True):
            if e < mlp.experts.down_proj.size(0):
                hidden = act(mlp.experts.gate_up_proj[e] @ xt + mlp.experts.gate_up_proj_bias[e])
                y[t] += w * (mlp.experts.down_proj[e] @ hidden + mlp.experts.down_proj_bias[e])
    return y


def scramble(mlp: Any) -> None:
    with torch.no_grad():
        for p in mlp.parameters():
            p.add_(torch.randn_like(p) * 0.3)


def test_a_point_goes_to_the_expert_of_its_place() -> None:
    torch.manual_seed(0)
    model, (x,) = samples.points()
    routed = gatecc.transform(
        model, gatecc.recipe("hash-experts", experts=3, weigh="gate", levels=2), (x,), verify=False
    )
    scramble(routed)
    mlp = cast("Any", routed)
    flat = x.flatten(0, 1)
    p = torch.softmax(mlp.router.logits(x, x), -1)
    gate, at = p.max(-1, keepdim=True)
    expected = mlp.head(torch.sin(flat + run(mlp, flat, gate, at)))
    assert at.unique().numel() > 1
    torch.testing.assert_close(routed(x).flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def by_task() -> tuple[nn.Module, Any]:
    model, inputs = samples.conditioned()
    recipe = gatecc.recipe("m3vit", experts=6, k=2, tasks=3, init="random(std=1)")
    return gatecc.transform(model, recipe, inputs, verify=False), inputs


def test_every_second_block_is_routed(by_task: tuple[nn.Module, Any]) -> None:
    assert [name for name, _ in routing.routers(by_task[0])] == ["blocks.1.mlp.router"]


def test_a_task_leaves_routers_and_experts_of_others_alone(by_task: tuple[nn.Module, Any]) -> None:
    model, (args, kwargs) = by_task
    model.eval()
    model.zero_grad()
    model(*args, **(kwargs | {"task": torch.tensor([1, 1])})).square().sum().backward()
    mlp = state(model)
    used = mlp.router.weight.grad.abs().sum((1, 2)) > 0
    assert used.tolist() == [False, True, False]
    touched = mlp.experts.down_proj.grad.abs().sum((1, 2)) > 0
    seen: list[Any] = []
    hook = mlp.router.register_forward_hook(lambda _m, _i, out: seen.append(out.indices))
    model(*args, **(kwargs | {"task": torch.tensor([1, 1])}))
    hook.remove()
    ran = torch.bincount(seen[0].flatten(), minlength=6) > 0
    assert touched.tolist() == ran.tolist()
    assert not touched.all()


def test_tasks_choose_differently(by_task: tuple[nn.Module, Any]) -> None:
    mlp = state(by_task[0])
    x = torch.randn(1, 40, mlp.experts.down_proj.size(1))
    scores = [mlp.router.logits(x, x, torch.tensor([task])) for task in range(3)]
    for task, z in enumerate(scores):
        rows = mlp.router.weight[task]
        torch.testing.assert_close(z, x[0] @ rows.T, rtol=1e-5, atol=1e-5)


def test_half_of_the_steps_are_balanced() -> None:
    torch.manual_seed(0)
    model, (ids,) = samples.language()
    recipe = gatecc.recipe("selective-sinkhorn", experts=4, iters=50, init="random(std=1)")
    routed = gatecc.transform(model, recipe, (ids,), verify=False).train()
    one = router(routed)
    x = torch.randn(2, 32, one.get_parameter("weight").size(1))
    z = one.logits(x, x)
    plan = transport_plan(torch.log_softmax(z, -1), 50)
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 16.0), atol=1e-3, rtol=0)
    for balanced in (True, False, True, False):
        weights, indices = one(x, x)
        top = (plan if balanced else torch.softmax(z, -1)).topk(2, -1)
        assert torch.equal(indices, top.indices)
        torch.testing.assert_close(weights, top.values / top.values.sum(-1, keepdim=True))
        routing.step(routed)


def test_experts_are_diverse_copies_and_the_gate_gets_sparse() -> None:
    torch.manual_seed(0)
    model, (ids,) = samples.language()
    recipe = gatecc.recipe("evomoe", experts=4, share=0.25, start=100.0, end=0.001, steps=4)
    routed = gatecc.transform(model, recipe, (ids,), verify=False).train()
    mlp = state(routed)
    rows = mlp.experts.gate_up_proj
    dense = cast("Any", model.get_submodule("blocks.0.mlp")).up.weight
    kept = rows != 0
    assert torch.equal(rows[kept], dense.expand_as(rows)[kept])
    assert abs(float((~kept).float().mean()) - 0.25) < 0.05
    assert not torch.equal(kept[0], kept[1])
    active: list[float] = []
    for _ in range(6):
        routed(ids)
        active.append(per_token(routed))
        routing.step(routed)
    assert active[0] == 4
    assert active[-1] == 1
    assert active == sorted(active, reverse=True)


def per_token(model: nn.Module) -> float:
    one = router(model)
    return float(one.counts.sum() / one.get_buffer("routed")[2])
