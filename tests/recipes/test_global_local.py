"""Global and local experts on real models: the threshold, who runs, and the gate as a classifier of errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gatecc
from gatecc.errors import ArgumentError
from tests.passes.ensemble.models import TEXT, calls_of, texts


@pytest.fixture(scope="module")
def model() -> Any:
    return gatecc.transform(texts(), gatecc.recipe("global-local", hidden=8), TEXT, verify=False)


def at(model: Any, t: float) -> Any:
    model.router.threshold.fill_(t)
    return model


def test_an_infinite_threshold_is_the_global_model_bitwise_and_none_the_local_one(model: Any) -> None:
    with torch.no_grad():
        for t, one in ((float("inf"), "bert"), (0.0, "distil")):
            with calls_of(model) as calls:
                assert torch.equal(at(model, t)(**TEXT).logits, texts().members[one](**TEXT).logits)
            assert calls == {"bert": [], "distil": [], one: [5]}


def test_each_sample_is_on_its_side_of_the_threshold(model: Any) -> None:
    with torch.no_grad():
        p = torch.softmax(model.logits(**TEXT), -1)[:, 1]
        t = float(p.sort().values[2])
        with calls_of(model) as calls:
            out = at(model, t)(**TEXT).logits
        assert calls == {"bert": [2], "distil": [3]}
        members = [texts().members[name](**TEXT).logits for name in ("bert", "distil")]
        assert torch.allclose(out, torch.where((p < t)[:, None], *members), atol=1e-6)


def test_the_gate_learns_which_samples_the_global_model_gets_wrong() -> None:
    model: Any = gatecc.transform(texts(), gatecc.recipe("global-local", hidden=8), TEXT, verify=False)
    wrong = torch.tensor([0, 1, 0, 0, 1])
    optimizer = torch.optim.Adam(model.router.parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model.logits(**TEXT), wrong).backward()
        optimizer.step()
    with torch.no_grad(), calls_of(model) as calls:
        model(**TEXT)
    assert calls == {"bert": [3], "distil": [2]}


def test_it_is_for_two_members() -> None:
    three = gatecc.ensemble([torch.nn.Linear(2, 2) for _ in range(3)], (torch.randn(2, 2),))
    with pytest.raises(ArgumentError, match="between two experts"):
        gatecc.transform(three, "global-local", (torch.randn(2, 2),))
