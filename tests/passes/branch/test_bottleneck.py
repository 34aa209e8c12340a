"""Bottleneck adapters as bodies of a branch, against products written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import gatecc
from gatecc.ir.gate import GateSpec
from gatecc.passes.branch.body import Body
from gatecc.passes.branch.bottleneck import Bottleneck, Bottlenecks
from gatecc.passes.branch.branch import Branch
from tests.graphs import MLP, done
from tests.recipes.checks import randomise


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("of", ["in", "self"])
def test_an_adapter(gated: bool, of: str) -> None:
    result = done(MLP, Branch(gatecc.MLP[...].out, Bottleneck(4, gated, "silu", of)))
    assert result.error == 0
    adapter = result.program.module.get_submodule("mlp.adapter")
    randomise(adapter.parameters())
    down, up = adapter.get_parameter("down"), adapter.get_parameter("up")
    v = result.values
    h = v["x" if of == "in" else "down"] @ down.T
    inner = F.silu(h[..., :4]) * h[..., 4:] if gated else F.silu(h)
    assert torch.allclose(result.run()[0], v["x"] + v["down"] + inner @ up.T, atol=1e-5)


def test_a_bank_of_adapters() -> None:
    gate = GateSpec("in", "linear", "expert", "softmax", init="random(std=1)")
    result = done(MLP, Branch(gatecc.MLP[...].out, Bottlenecks(2, 4, True, "silu", "in"), gate))
    assert result.error == 0
    bank = result.program.module.get_submodule("mlp.adapters")
    randomise(bank.parameters())
    v, router = result.values, result.program.module.get_parameter("mlp.branch.weight")
    weights, expected = (v["x"] @ router.T).softmax(-1), v["x"] + v["down"]
    for e in range(2):
        h = v["x"] @ bank.get_parameter("down")[e].T
        expected = expected + weights[..., e : e + 1] * (F.silu(h[..., :4]) * h[..., 4:]) @ bank.get_parameter("up")[e]
    assert torch.allclose(result.run()[0], expected, atol=1e-5)


@pytest.mark.parametrize("body", [Bottleneck(3, True, of="in"), Bottlenecks(2, 3)])
def test_a_body_is_its_text_and_its_json(body: Body) -> None:
    assert Body.parse(str(body)) == Body.from_json(body.to_json()) == body
