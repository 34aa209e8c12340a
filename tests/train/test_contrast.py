"""The contrast of task routers: two sequences of one task are closer than two of different tasks after training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import ArgumentError
from gatecc.recipes import samples
from gatecc.train.contrast import TaskContrast, info_nce


def test_the_loss_is_that_of_the_paper() -> None:
    q, k = torch.eye(3)[[0, 0, 1]], torch.eye(3)[[0, 1, 1]]
    tasks = torch.tensor([0, 0, 1])
    # the first two have one key of their task each; keys of others: 1. The third has none.
    first = -math.log(math.exp(0 / 0.5) / (math.exp(0 / 0.5) + math.exp(0 / 0.5)))
    second = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + math.exp(0 / 0.5)))
    assert float(info_nce(q, k, tasks, 0.5)) == pytest.approx((first + second) / 2, rel=1e-6)
    assert float(info_nce(q, k, torch.arange(3))) == 0


def test_sequences_of_a_task_are_routed_alike_after_training() -> None:
    torch.manual_seed(0)
    model, inputs = samples.sequences()
    routed = gatecc.transform(model, gatecc.recipe("t2mir", experts=4, k=1), inputs, verify=False)
    contrast = TaskContrast(routed, momentum=0.5)
    assert sorted(contrast.routers) == ["blocks.0.mlp.router_1", "blocks.1.mlp.router_1"]
    with pytest.raises(ArgumentError, match="did not run"):
        contrast(torch.zeros(2))
    with torch.no_grad():
        for router in contrast.routers.values():
            router.get_parameter("weight").normal_(0, 0.1)
    tasks = torch.arange(8) % 2
    x = torch.randn(8, 6, 16) + 0.7 * torch.randn(2, 1, 16)[tasks]
    optimizer = torch.optim.Adam([p for r in contrast.routers.values() for p in r.parameters()], lr=1e-2)
    losses: list[float] = []
    for _ in range(25):
        routed(x)
        loss = contrast(tasks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        contrast.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for name, router in contrast.routers.items():
        z = nn.functional.normalize(contrast._logits(router, contrast._read[name]), dim=-1)
        alike = z @ z.T
        same = tasks[:, None] == tasks
        assert float(alike[same].mean().detach()) > float(alike[~same].mean().detach()) + 0.1
    contrast.remove()
    with pytest.raises(ArgumentError, match="no router for sequences"):
        TaskContrast(model)
