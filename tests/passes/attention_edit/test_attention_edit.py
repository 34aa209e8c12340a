"""Edits of the scores, against attention that is written down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import gatecc
from gatecc.engine.contracts import compare
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.passes.attention_edit.attention_edit import AttentionEdit
from gatecc.passes.attention_edit.change import Change
from gatecc.passes.attention_edit.distance_bias import DistanceBias
from gatecc.recipes import samples
from tests.graphs import attention, done
from tests.recipes.checks import case, new_parameters, randomise, reverted

BIAS = AttentionEdit("attention[...]", DistanceBias(2))
MASKS: dict[str, tuple[bool, str, str]] = {
    "none": (False, "None", ""),
    "causal": (True, "None", ""),
    "input": (False, "%mask", "%mask = input  # n n"),
    "boolean": (False, "%mask", "%mask = input  # n n bool"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_number_for_each_distance_joins_the_mask(kind: str) -> None:
    result = done(attention(*MASKS[kind]), BIAS)
    assert result.error <= 1e-6
    table = result.program.module.get_parameter("att.edit.table")
    assert table.shape == (4, 5)
    nn.init.normal_(table)
    v = result.values
    n = v["qh"].size(2)
    bias = torch.zeros(4, n, n)
    for h in range(4):
        for i in range(n):
            for j in range(n):
                bias[h, i, j] = table[h, max(-2, min(2, j - i)) + 2]
    mask = v.get("mask", torch.zeros(n, n))
    hidden = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
    hidden = hidden + torch.full((n, n), -torch.inf).triu(1) if kind == "causal" else hidden
    heads = (v["qh"] @ v["kr"].mT / 2**0.5 + bias + hidden).softmax(-1) @ v["vr"]
    expected = heads.transpose(1, 2).flatten(2) @ result.program.module.get_parameter("att.o.weight").T
    rows = torch.isfinite(expected)  # a boolean mask of random values may hide every key of a query
    assert torch.allclose(result.run()[0][rows], expected[rows], atol=1e-5)


@pytest.mark.parametrize("name", ["hf/llama-sdpa", "hf/bert_padded-eager", "timm/vit-sdpa"])
def test_on_models_of_others(name: str) -> None:
    known = case(name)
    model = gatecc.transform(known.model, BIAS, known.inputs)
    randomise(new_parameters(model, known.model).values())
    with torch.no_grad():
        assert compare(*(m(*known.args, **known.kwargs) for m in (known.model, model))) > 1e-3
    reverted(model, known.model, known.args, known.kwargs)


def test_decoded_and_saved(tmp_path: Path) -> None:
    plain, inputs = samples.language()
    model = gatecc.transform(plain, BIAS, inputs)
    randomise(new_parameters(model, plain).values())
    with torch.no_grad():
        expected = model(*inputs)
        gatecc.save(model, tmp_path / "saved")
        assert torch.equal(gatecc.load(samples.language()[0], tmp_path / "saved")(*inputs), expected)
        decoder = gatecc.decoder(model, inputs)
        out, state = decoder.prefill(inputs[0][:, :3])
        outs = [out]
        for at in range(3, inputs[0].size(1)):
            out, state = decoder.step(inputs[0][:, at : at + 1], state)
            outs.append(out)
        assert torch.allclose(torch.cat(outs, 1), expected, atol=1e-5)


def test_what_cannot_be_edited() -> None:
    with pytest.raises(ArgumentError, match="changes it as a whole"):
        AttentionEdit("attention[...].q", DistanceBias())
    with pytest.raises(ArgumentError, match="span is out of range"):
        DistanceBias(0)
    with pytest.raises(ArgumentError, match="no change has this name"):
        Change.parse("biases(3)")
    t5 = case("hf/t5-eager")
    cross = AttentionEdit("attention[*.EncDecAttention]", DistanceBias(2))
    with pytest.raises(SiteRefusedError, match="queries and keys of different sequences"):
        gatecc.transform(t5.model, cross, t5.inputs)
