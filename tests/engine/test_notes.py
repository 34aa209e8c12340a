"""Notes of a report: what was done as told, and perhaps not as meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gatecc

X = torch.randn(2, 6, 16)


def _model(layers: int = 1) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), layers).eval()


def _notes(model: nn.Module, recipe: Any = "gated-attention", **options: Any) -> tuple[nn.Module, str]:
    result = gatecc.transform(model, recipe, (X,), verify=False, **options)
    return result, "\n".join(gatecc.last_report(result).notes)


def test_the_same_recipe_twice() -> None:
    once, first = _notes(_model())
    assert "already" not in first
    _, second = _notes(once)
    assert "holds gate of gated-attention already (transform 1), at 1 of these sites" in second
    _, other = _notes(once, gatecc.recipe("gated-attention", granularity="element"))
    assert "already (transform 1, with other options), at 1 of these sites" in other
    _, elsewhere = _notes(once, gatecc.recipe("gated-attention", position="v"))
    assert "already" not in elsewhere
    gate = gatecc.Gate("mlp[...].out", gatecc.GateSpec("self"))
    assert "gate mlp[...].out is in the list twice" in _notes(_model(), [gate, gate])[1]


@pytest.mark.parametrize(("tokens", "prefix"), [(9, 0), (10, 1)])
def test_a_number_of_tokens_that_is_a_square_by_luck(tokens: int, prefix: int) -> None:
    x = torch.randn(2, tokens, 16)
    for options, told in (({}, True), ({"rows": 1, "columns": 9}, False)):
        recipe = gatecc.recipe("vig", prefix=prefix, **options)
        notes = gatecc.last_report(gatecc.transform(_model(), recipe, (x,), verify=False)).notes
        behind = " behind 1" if prefix else ""
        note = f"the 9 tokens{behind} are taken for an image of 3 rows of 3 patches"
        assert any(note in n for n in notes) is told


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_that_was_made_before(kind: Any) -> None:
    model = _model()
    optimizer = kind(model.parameters(), lr=0.1)
    copy, note = _notes(model)
    assert "the result is a copy" in note
    _, note = _notes(model, inplace=True)
    assert "does not hold the new parameters" in note
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in copy.parameters()}


def test_no_optimizer_no_note() -> None:
    model = _model()
    others = [*model.parameters()]  # a list of parameters is no optimizer
    torch.optim.SGD(nn.Linear(2, 2).parameters())
    _, note = _notes(model)
    assert "optimizer" not in note
    assert others


def test_what_is_kept_and_not_there() -> None:
    rewrite = gatecc.Gate(
        gatecc.Attention[...].heads.but("decoder.*"), gatecc.GateSpec("hidden", "linear", "head", "sigmoid")
    )
    _, note = _notes(_model(2), rewrite)
    assert "what is kept matches none of the 2 attention sites" in note
    kept = gatecc.Gate(gatecc.Attention[...].heads.but(0), rewrite.gate)
    assert "kept" not in _notes(_model(2), kept)[1]
