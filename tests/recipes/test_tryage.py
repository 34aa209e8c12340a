"""Tryage on real models: the least predicted loss plus what a member costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gatecc
from gatecc.errors import ArgumentError
from tests.passes.ensemble.models import TEXT, calls_of, images, texts

LABELS = torch.tensor([0, 1, 2, 0, 1])


def loss(output: Any) -> torch.Tensor:
    return F.cross_entropy(output.logits, LABELS, reduction="none")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = gatecc.transform(texts(), gatecc.recipe("tryage", hidden=8), TEXT, verify=False)
    with torch.no_grad():
        made.get_parameter("router.weight").normal_()
    return made


def test_without_costs_each_sample_has_the_member_of_least_predicted_loss(model: Any) -> None:
    with torch.no_grad():
        best = model.logits(**TEXT).argmin(-1)
        with calls_of(model) as calls:
            out = model(**TEXT).logits
        members = torch.stack([texts().members[name](**TEXT).logits for name in ("bert", "distil")], 1)
    assert 0 < int(best.sum()) < 5
    assert {name: sum(sizes) for name, sizes in calls.items()} == {
        "bert": 5 - int(best.sum()),
        "distil": int(best.sum()),
    }
    assert torch.allclose(out, members[torch.arange(5), best], atol=1e-6)


@pytest.mark.parametrize(("cost", "cheapest"), [("size", "distil"), ("flops", "distil")])
def test_a_large_weight_of_a_cost_picks_the_smallest(cost: str, cheapest: str) -> None:
    large: Any = gatecc.transform(texts(), gatecc.recipe("tryage", hidden=8, **{cost: 1e6}), TEXT, verify=False)
    key = "parameters" if cost == "size" else "flops"
    costs = {name: getattr(texts().costs[name], key) for name in texts().members}
    assert costs["distil"] < costs["bert"]
    expected = torch.tensor([1e6 * costs[name] / max(costs.values()) for name in costs])
    assert torch.allclose(large.router.cost, expected)
    with torch.no_grad(), calls_of(large) as calls:
        assert torch.equal(large(**TEXT).logits, texts().members[cheapest](**TEXT).logits)
    assert calls == {"bert": [], "distil": [], cheapest: [5]}


def test_penalties_are_one_for_each_member() -> None:
    recent: Any = gatecc.transform(images(), gatecc.recipe("tryage", penalties=(0.0, 1e6), reads="pool(pixel_values)"),
                                   {"pixel_values": images_inputs()}, verify=False)  # fmt: skip
    with torch.no_grad(), calls_of(recent) as calls:
        recent(images_inputs())
    assert calls == {"vit": [5], "resnet": []}
    with pytest.raises(ArgumentError, match="one penalty for each member"):
        gatecc.transform(texts(), gatecc.recipe("tryage", penalties=(1.0,)), TEXT)


def images_inputs() -> torch.Tensor:
    from tests.passes.ensemble.models import PIXELS

    return PIXELS


def test_predictions_are_trained_on_measured_losses(model: Any) -> None:
    targets = gatecc.train.member_losses(model, loss, **TEXT)
    for number, name in enumerate(texts().members):
        assert torch.allclose(targets[:, number], loss(texts().members[name](**TEXT)), atol=1e-6)
    optimizer = torch.optim.Adam(model.router.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(model.logits(**TEXT), targets).backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(model.logits(**TEXT).argmin(-1), targets.argmin(-1))
        assert float(loss(model(**TEXT)).mean()) == pytest.approx(float(targets.amin(-1).mean()), abs=1e-5)
    model.zero_grad()
    loss(model(**TEXT)).mean().backward()
    assert all(p.grad is None for p in model.router.parameters())
    with pytest.raises(ArgumentError, match="one number for each sample"):
        gatecc.train.member_losses(model, lambda out: loss(out).mean(), **TEXT)
