"""Model surgery on real models: the rows that are chosen, what they become, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError

IDS = {"input_ids": torch.arange(20).view(2, 10)}
V = torch.randn(32, generator=torch.Generator().manual_seed(0))
DIRECTION = tuple(V.tolist())
SMALL: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=40)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=16)).eval()


FAMILIES = {
    "llama": (llama, {}, "model.layers.{}.mlp.gate_proj.weight", False),
    "gpt2": (gpt2, {"weight": "up"}, "transformer.h.{}.mlp.c_fc.weight", True),  # a Conv1D: rows are columns
}


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_against_the_direction_are_moved_along_it(family: str, tmp_path: Path) -> None:
    make, options, path, columns = FAMILIES[family]
    base, names = make(), [path.format(layer) for layer in range(2)]
    recipe = gatecc.recipe("model-surgery", direction=DIRECTION, alpha=0.5, count=20, **options)
    edited = gatecc.transform(base, recipe, IDS)
    matrices = [base.get_parameter(name).detach().T if columns else base.get_parameter(name).detach() for name in names]
    score = -torch.cosine_similarity(torch.cat(matrices), V, dim=1)
    chosen = torch.zeros(len(score), dtype=torch.bool)
    chosen[score.topk(20).indices] = True
    expected = torch.where(chosen[:, None], torch.cat(matrices) + 0.5 * V, torch.cat(matrices))
    got = torch.cat(
        [edited.get_parameter(n).detach().T if columns else edited.get_parameter(n).detach() for n in names]
    )
    assert torch.equal(got, expected)
    own = {n: t for n, t in edited.state_dict().items() if ".shifted." not in n and n not in names}
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in own.items())
    assert type(edited) is type(base)  # every module runs its own forward
    assert same(gatecc.revert(edited), base)
    gatecc.save(edited, tmp_path / "ck")
    loaded = gatecc.load(make(), tmp_path / "ck")
    assert same(loaded, edited)
    assert same(gatecc.revert(loaded), base)
    assert same(gatecc.revert(edited.to(torch.bfloat16)), make().to(torch.bfloat16))


def test_nothing_is_nothing_and_training_stays() -> None:
    base = llama()
    assert same(gatecc.transform(base, gatecc.recipe("model-surgery", direction=DIRECTION, alpha=0.0), IDS), base)
    edited = gatecc.transform(base, gatecc.recipe("model-surgery", direction=DIRECTION, count=20), IDS)
    name = "model.layers.0.mlp.gate_proj.weight"
    weight, rows = edited.get_parameter(name), edited.get_buffer("model.layers.0.mlp.gate_proj.shifted.rows")
    with torch.no_grad():
        weight[rows[0]] += 0.25
    back = gatecc.revert(edited).get_parameter(name)
    expected = base.get_parameter(name).detach().clone()
    expected[rows[0]] += 0.25
    assert torch.allclose(back, expected, atol=1e-6)
    assert torch.equal(back[rows[1:]], expected[rows[1:]])


def test_what_does_not_fit_is_refused() -> None:
    def surgery(model: nn.Module, **options: Any) -> None:
        gatecc.transform(model, gatecc.recipe("model-surgery", **options), IDS)

    with pytest.raises(SiteRefusedError, match="does not fit the rows"):
        surgery(llama(), direction=DIRECTION[:5], count=3)
    with pytest.raises(SiteRefusedError, match="no such projection"):
        surgery(gpt2(), direction=DIRECTION, count=3)
    with pytest.raises(SiteRefusedError, match="no such projection"):  # which half is the gate is not known
        surgery(
            Phi3ForCausalLM(Phi3Config(**SMALL, vocab_size=40, pad_token_id=0)).eval(), direction=DIRECTION, count=3
        )
    with pytest.raises(ArgumentError, match="more rows"):
        surgery(llama(), direction=DIRECTION)
    for wrong in ({"direction": ()}, {"direction": (0.0,) * 32}, {"direction": DIRECTION, "count": 0}):
        with pytest.raises(ArgumentError, match="out of range"):
            surgery(llama(), **wrong)


def test_a_probe_finds_the_direction() -> None:
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    hidden: Tensor = torch.randn(200, 32) + labels[:, None] * V
    means, read = gatecc.train.mean_difference(hidden, labels), torch.tensor(gatecc.train.probe(hidden, labels))
    assert torch.cosine_similarity(torch.tensor(means), V, dim=0) > 0.95
    assert torch.cosine_similarity(read, V, dim=0) > 0.6  # what separates them best is not the difference itself
    score = hidden @ read  # the two kinds overlap a little
    assert ((score > score.mean()) == labels.bool()).float().mean() > 0.97
    with pytest.raises(ArgumentError, match="two kinds"):
        gatecc.train.probe(hidden, torch.ones(200))
    with pytest.raises(ArgumentError, match="equal means"):
        gatecc.train.mean_difference(torch.ones(200, 4), labels)
