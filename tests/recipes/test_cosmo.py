"""COSMO against its equations, on the probabilities of two real models, and its sweep."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import ArgumentError, TrainingError
from tests.passes.ensemble.models import TEXT, bert, calls_of, distilbert, texts

SEEN, UNSEEN = (0, 1), (2,)


@pytest.fixture(scope="module")
def plain() -> gatecc.Ensemble:
    torch.manual_seed(1)
    heads = {"seen": nn.Softmax(-1), "unseen": nn.Softmax(-1)}
    return gatecc.ensemble({"seen": bert(), "unseen": distilbert()}, TEXT, output="logits", project=heads).eval()


@pytest.fixture(scope="module")
def model(plain: gatecc.Ensemble) -> Any:
    return gatecc.transform(plain, gatecc.recipe("cosmo", seen=SEEN, unseen=UNSEEN), TEXT, verify=False)


def experts(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    values = model.outputs(model.inputs.bind((), TEXT), model.members)
    return values["seen"], values["unseen"]


def test_the_equation(model: Any) -> None:
    with torch.no_grad():
        seen, unseen = experts(model)
        s = seen.amax(-1, keepdim=True)
        model.router.threshold.fill_(float(s.median()))
        model.router.temperature.fill_(0.005)
        g = torch.sigmoid((s.median() - s) / 0.005)
        flat = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
        hand = (1 - g) * ((1 - g) * seen + g * flat[0]) + g * (g * unseen + (1 - g) * flat[1])
        out = model(**TEXT)
    assert float(g.max() - g.min()) > 0.1
    assert torch.allclose(out, hand, atol=1e-6)
    assert torch.allclose(out.sum(-1), torch.ones(5), atol=1e-6)


def test_a_gate_of_one_or_zero_is_an_expert_exactly(model: Any) -> None:
    model.router.temperature.fill_(1e-4)
    with torch.no_grad():
        for t, expert, called in ((2.0, 1, [5]), (-2.0, 0, [])):
            model.router.threshold.fill_(t)
            with calls_of(model) as calls:
                assert torch.equal(model(**TEXT), experts(copy.copy(model))[expert])
            assert calls["unseen"][: len(called)] == called
            with calls_of(model) as calls:
                model(**TEXT)
            assert calls == {"seen": [5], "unseen": called}  # a weight of 0 does not run; the gate reads the first


def test_the_sweep_finds_the_best_threshold_and_runs_members_once(model: Any) -> None:
    def score(outputs: list[torch.Tensor]) -> float:
        return float(sum(out[:, 2].mean() for out in outputs))  # the unseen class alone

    with calls_of(model) as calls:
        t, temperature, best = gatecc.train.sweep(model, [TEXT, TEXT], score, [-1.0, 0.2, 0.5, 2.0], [0.01, 0.1])
    assert calls == {"seen": [5, 5], "unseen": [5, 5]}
    assert (float(model.router.threshold), float(model.router.temperature)) == pytest.approx((t, temperature))
    tried: dict[tuple[float, float], float] = {}
    for each in (-1.0, 0.2, 0.5, 2.0):
        for T in (0.01, 0.1):
            model.router.threshold.fill_(each)
            model.router.temperature.fill_(T)
            with torch.no_grad():
                tried[each, T] = score([model(**TEXT), model(**TEXT)])
    assert best == pytest.approx(max(tried.values()))
    assert tried[t, temperature] == pytest.approx(best)
    with pytest.raises(TrainingError, match="no router"):
        gatecc.train.sweep(texts(), [TEXT], score, [0.5])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seen": (0, 3), "unseen": (1,)}, "no such classes"),
        ({"seen": (0, 0), "unseen": (1,)}, "no such classes"),
        ({"seen": (), "unseen": (1,)}, "classes that each member knows"),
        ({"seen": (0,), "unseen": (1,), "expert": "other"}, "does not have"),
    ],
)
def test_wrong_classes(plain: gatecc.Ensemble, options: dict[str, Any], error: str) -> None:
    with pytest.raises(ArgumentError, match=error):
        gatecc.transform(plain, gatecc.recipe("cosmo", **options), TEXT)
