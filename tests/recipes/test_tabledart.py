"""TableDART on a text model, an image model and a fusion of both: one path per sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.capture.flops import counted
from tests.passes.ensemble.models import MASK, PIXELS, TEXT, calls_of, images, texts

INPUTS = {**TEXT, "pixel_values": PIXELS}


class Fusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Linear(6, 3)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        return self.mixed(torch.cat([text, image], -1))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    text, image = texts().members["bert"], images().members["resnet"]
    ensemble = gatecc.ensemble(
        {"text": text, "image": image, "fusion": Fusion()},
        INPUTS,
        inputs={
            "image": {"x": "pixel_values"},
            "fusion": {"text": "text", "image": "image"},
            "words": {"input": "input_ids"},
        },
        output={"text": "logits"},
        features={"words": text.get_input_embeddings()},  # pyright: ignore[reportCallIssue] - a model of transformers
    )
    return gatecc.transform(ensemble, gatecc.recipe("tabledart", hidden=4), INPUTS, verify=False)


def test_only_the_path_of_a_sample_runs(model: Any) -> None:
    paths = {"text": {"text": 5}, "image": {"image": 5}, "fusion": {"text": 5, "image": 5, "fusion": 5}}
    with torch.no_grad():
        for number, (name, ran) in enumerate(paths.items()):
            model.router.weight.zero_()
            model.router.bias.copy_(torch.eye(3)[number])
            with calls_of(model) as calls:
                out, flops = counted(lambda: model(**INPUTS))
            assert flops == 5 * model.path([name]).flops
            assert {n: sum(sizes) for n, sizes in calls.items() if sizes} == ran
            text, image = model.members["text"](**TEXT).logits, model.members["image"](PIXELS)
            alone = {"text": text, "image": image, "fusion": model.members["fusion"](text, image)}
            assert torch.equal(out, alone[name])


def test_the_size_of_the_gate_is_reported(model: Any) -> None:
    gate = 16 * 4 + 4 + 4 * 3 + 3
    report = gatecc.last_report(model)
    assert sum(report.rewrites[0].new_parameters.values()) == gate
    assert f"{gate:>15,}" in model.describe()
    assert any(note.startswith("a sample of fusion: ") for note in report.notes)


def test_a_dear_path_is_left_when_it_is_not_better(model: Any) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1])
    losses = gatecc.train.member_losses(model, lambda out: F.cross_entropy(out, labels, reduction="none"), **INPUTS)
    assert losses.shape == (5, 3)
    alone = F.cross_entropy(model.members["image"](PIXELS), labels, reduction="none")
    assert torch.allclose(losses[:, 1], alone, atol=1e-6)
    optimizer = torch.optim.Adam(model.router.parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        gatecc.train.expected_loss(model.logits(**INPUTS), losses, torch.tensor([0.0, 50.0, 100.0])).backward()
        optimizer.step()
    with torch.no_grad(), calls_of(model) as calls:
        model(**INPUTS)
    assert calls == {"text": [5], "image": [], "fusion": []}
    logits = torch.tensor([[0.0, 1.0]])
    p = torch.sigmoid(torch.tensor(1.0))
    by_hand = (1 - p) * 3 + p * 5
    assert torch.allclose(gatecc.train.expected_loss(logits, torch.tensor([[2.0, 4.0]]), torch.ones(2)), by_hand)


def test_the_task_reaches_the_gate(model: Any) -> None:
    model.zero_grad()
    F.cross_entropy(
        model(input_ids=TEXT["input_ids"], attention_mask=MASK, pixel_values=PIXELS), torch.zeros(5).long()
    ).backward()
    assert float(model.router.weight.grad.abs().sum()) > 0
