"""AdaptDHM on real models: one network per cluster, centres that follow the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gatecc
from gatecc.errors import TrainingError
from tests.passes.ensemble.models import TEXT, calls_of, texts


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return gatecc.transform(texts(), "adaptdhm", TEXT, verify=False)


def prompts(model: Any) -> torch.Tensor:
    return model.features["prompt"](TEXT["input_ids"]).mean(1)


def test_one_cluster_is_the_base_model() -> None:
    base = texts().members["bert"]
    embedding = {"prompt": texts().features["prompt"]}
    one = gatecc.ensemble({"base": base}, TEXT, features=embedding, inputs={"prompt": {"input": "input_ids"}})
    model: Any = gatecc.transform(one, "adaptdhm", TEXT, verify=False)
    with torch.no_grad():
        assert torch.equal(model(**TEXT).logits, base(**TEXT).logits)


def test_each_sample_runs_through_the_network_of_its_nearest_centre(model: Any) -> None:
    with torch.no_grad():
        x = prompts(model)
        model.router.weight.copy_(x[:2])
        nearest = F.cosine_similarity(x[:, None], x[None, :2], dim=-1).argmax(-1)
        assert nearest[:2].tolist() == [0, 1]
        with calls_of(model) as calls:
            out = model(**TEXT).logits
        members = torch.stack([texts().members[name](**TEXT).logits for name in ("bert", "distil")], 1)
    assert {name: sum(sizes) for name, sizes in calls.items()} == {
        "bert": 5 - int(nearest.sum()),
        "distil": int(nearest.sum()),
    }
    assert torch.allclose(out, members[torch.arange(5), nearest], atol=1e-6)


def test_centres_have_no_gradient_and_move_as_an_average(model: Any) -> None:
    assert not model.router.weight.requires_grad
    model(**TEXT).logits.sum().backward()
    assert model.router.weight.grad is None
    with torch.no_grad():
        x = F.normalize(prompts(model), dim=-1)
        old = F.normalize(model.router.weight, dim=-1)
        moved, c = old, torch.empty(0)
        for _ in range(2):
            c = torch.softmax(x @ moved.T / 0.1, -1)
            moved = torch.stack([F.normalize(sum(c[b, k] * x[b] for b in range(5)), dim=-1) for k in range(2)])  # pyright: ignore[reportArgumentType] - a sum of tensors
        hand = 0.9 * old + 0.1 * moved
    found = gatecc.train.update_centres(model, decay=0.9, iterations=2, **TEXT)
    assert torch.allclose(found, c, atol=1e-5)
    assert torch.allclose(model.router.weight, hand, atol=1e-5)
    with pytest.raises(TrainingError, match="no cluster centres"):
        gatecc.train.update_centres(gatecc.transform(texts(), "mm-drex", TEXT), **TEXT)  # pyright: ignore[reportArgumentType] - it stays an ensemble


def test_centres_find_two_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])]).view(2, 2).repeat_interleave(8, 0)
    x = x + 0.3 * torch.randn(16, 2, generator=generator)
    ensemble = gatecc.ensemble([torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)], (x,))
    model: Any = gatecc.transform(ensemble, "adaptdhm", (x,), verify=False)
    with torch.no_grad():
        model.router.weight.copy_(torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    for _ in range(40):
        gatecc.train.update_centres(model, x, decay=0.8)
    assert model.logits(x).argmax(-1).tolist() == [0] * 8 + [1] * 8
    assert float(F.normalize(model.router.weight, dim=-1).diagonal().min()) > 0.99
