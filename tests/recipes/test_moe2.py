"""MoE²: the gate of all members restricted to those that a budget allows, on real models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gatecc
from gatecc.errors import ArgumentError, TrainingError
from gatecc.train import Budget, choose_subset, restrict
from tests.passes.ensemble.models import TEXT, by_hand, calls_of, texts

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def four() -> Any:
    torch.manual_seed(0)
    members = {name: nn.Linear(3, 2) for name in "abcd"}
    model: Any = gatecc.transform(gatecc.ensemble(members, (X,)), gatecc.recipe("moe2", hidden=4), (X,), verify=False)
    with torch.no_grad():
        model.router.weight.normal_()
    return model


@settings(max_examples=10)
@given(st.sets(st.sampled_from("abcd"), min_size=1))
def test_a_restriction_is_the_whole_gate_renormalised(four: Any, allowed: set[str]) -> None:
    restrict(four, set("abcd"))
    with torch.no_grad():
        g = torch.softmax(four.logits(X), -1)
        kept = g * torch.tensor([name in allowed for name in "abcd"])
        restrict(four, allowed)
        with calls_of(four) as calls:
            out = four(X)
        assert torch.allclose(out, by_hand(four, kept / kept.sum(-1, keepdim=True), X), atol=1e-6)
        masked = torch.softmax(four.logits(X).masked_fill(~four.router.allowed, float("-inf")), -1)
        assert torch.allclose(kept / kept.sum(-1, keepdim=True), masked, atol=1e-6)
    assert {name for name, sizes in calls.items() if sizes} == allowed


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
    st.integers(0, 20),
    st.integers(0, 9),
    st.lists(st.integers(0, 5), min_size=4, max_size=4),
)
def test_the_best_subset_within_all_budgets(
    four: Any, energy: list[int], latency: list[int], limit: int, slowest: int, worth: list[int]
) -> None:
    budgets = [
        Budget(dict(zip("abcd", energy, strict=True)), limit),
        Budget(dict(zip("abcd", latency, strict=True)), slowest, "max"),
    ]
    worths = dict(zip("abcd", worth, strict=True))

    def value(members: tuple[str, ...]) -> float:
        return sum(worths[name] for name in members)

    sets = [s for n in range(1, 5) for s in itertools.combinations("abcd", n)]
    within = [s for s in sets if sum(energy["abcd".index(m)] for m in s) <= limit
              and max(latency["abcd".index(m)] for m in s) <= slowest]  # fmt: skip
    if not within:
        with pytest.raises(ArgumentError, match="no member is within the budget"):
            choose_subset(four, value, budgets)
        return
    found = choose_subset(four, value, budgets)
    assert all(budget.allows(found) for budget in budgets)
    assert value(found) == max(map(value, within))


def test_real_models_within_a_budget_of_operations() -> None:
    model: Any = gatecc.transform(texts(), gatecc.recipe("moe2", hidden=8), TEXT, verify=False)
    flops = Budget({name: model.costs[name].flops for name in model.members}, model.costs["distil"].flops)
    assert choose_subset(model, len, [flops]) == ("distil",)
    restrict(model, ("distil",))
    with torch.no_grad(), calls_of(model) as calls:
        assert torch.equal(model(**TEXT).logits, texts().members["distil"](**TEXT).logits)
    assert calls == {"bert": [], "distil": [5]}


def test_wrong_restrictions(four: Any) -> None:
    for members in ((), ("a", "z")):
        with pytest.raises(ArgumentError, match="some of its members"):
            restrict(four, members)
    with pytest.raises(TrainingError, match="can be restricted"):
        restrict(texts(), ("bert",))
    with pytest.raises(ArgumentError, match="cost of each member"):
        choose_subset(four, len, [Budget({"a": 1.0, "b": -1.0, "c": 1.0, "d": 1.0}, 3.0)])
