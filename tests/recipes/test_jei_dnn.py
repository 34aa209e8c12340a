"""JEI-DNN on models of timm and transformers: each sample by itself, and gates trained on the frozen model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from gatecc.capture.flops import counted
from gatecc.train import exit_logits, exits, fit_exits


def vit() -> tuple[Any, Any]:
    timm: Any = pytest.importorskip("timm")
    shape: Any = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **shape).eval(), (torch.randn(5, 3, 16, 16),)


def bert() -> tuple[Any, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    shape: Any = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    mask = torch.ones(5, 9, dtype=torch.long)
    mask[1, 4:] = mask[3, 6:] = 0
    shape |= {"vocab_size": 50, "num_labels": 4}
    model = BertForSequenceClassification(BertConfig(**shape)).eval()
    return model, {"input_ids": torch.randint(0, 50, (5, 9)), "attention_mask": mask}


def resnet() -> tuple[Any, Any]:
    """Its blocks differ in width, and norms in training see the whole batch."""
    timm: Any = pytest.importorskip("timm")
    shape: Any = {"layers": (2, 2, 1, 1), "channels": (8, 16, 24, 32), "num_classes": 4, "in_chans": 1}
    return timm.create_model("resnet18", **shape).eval(), (torch.randn(5, 1, 32, 32),)


@pytest.mark.broad(3)
@pytest.mark.parametrize(("make", "head"), [(vit, "tail"), (bert, "tail"), (resnet, "pooled")])
def test_trained_gates_let_each_sample_leave_by_itself(make: Any, head: str) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    made: Any = gatecc.transform(model, gatecc.recipe("jei-dnn", head=head), inputs)
    batch = inputs if isinstance(inputs, dict) else inputs[0]
    with torch.no_grad():
        assert torch.equal(call(made, inputs), call(model, inputs))
    labels = torch.tensor([0, 1, 2, 3, 0])
    fitted = fit_exits(made, [(batch, labels)], steps=12, warmup=0.5, period=2)
    assert len(fitted.gates) == 4  # two turns of two in the last six steps: gates, heads, gates
    rules = exits(made)
    assert all(p.grad is None for p in made.parameters())
    assert all(float(p.detach().abs().sum()) > 0 for rule in rules for p in rule.parameters())
    with torch.no_grad():
        early = exit_logits(made, batch)
        scores = torch.stack([rule.score(z) for rule, z in zip(rules, early, strict=False)], -1)
        for rule, column in zip(rules, scores.unbind(-1), strict=True):
            ordered = column.sort().values
            rule.threshold.fill_(float(ordered[2:4].mean()))  # two leave at the first
        leaves = scores >= torch.stack([rule.threshold for rule in rules])
        first = torch.cat([leaves, torch.ones(5, 1, dtype=torch.bool)], -1).int().argmax(-1)
        expected = torch.stack([early[int(at)][i] for i, at in enumerate(first)])
        out, spent = counted(lambda: call(made, inputs))
        assert torch.allclose(out, expected, atol=1e-5)
        for i in (0, 3):
            assert torch.allclose(call(made, inputs, i), expected[i : i + 1], atol=1e-4)
        assert spent < counted(lambda: call(model, inputs))[1]


def call(model: Any, inputs: Any, row: int | None = None) -> Tensor:
    rows = slice(None) if row is None else slice(row, row + 1)
    if isinstance(inputs, dict):
        return model(**{name: value[rows] for name, value in inputs.items()}).logits
    return model(*(value[rows] for value in inputs))


def test_running_statistics_see_every_sample() -> None:
    torch.manual_seed(0)
    model, inputs = resnet()
    made: Any = gatecc.transform(model, gatecc.recipe("jei-dnn", sites="block[0]"), inputs)
    for rule in exits(made):
        rule.threshold.fill_(0.0)  # everyone leaves
    made.train()(*inputs).sum().backward()
    model.train()(*inputs)
    assert torch.allclose(made.layer2[1].bn1.running_mean, model.layer2[1].bn1.running_mean)
