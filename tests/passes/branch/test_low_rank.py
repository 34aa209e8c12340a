"""Low-rank adapters as bodies of a branch, against products written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.gate import GateSpec
from gatecc.ir.router import RouterSpec
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.low_rank import Lora, Loras
from gatecc.passes.branch.weighted import weighted_sum
from tests.graphs import MLP, Done, attention, done
from tests.recipes.checks import randomise

GATE = GateSpec("in", "linear", "expert", "softmax", init="zero")


def _random(result: Done, path: str) -> dict[str, nn.Parameter]:
    parameters = dict(result.program.module.get_submodule(path).named_parameters())
    randomise(parameters.values())
    return parameters


def test_a_lora_adds_its_product() -> None:
    result = done(MLP, Branch(gatecc.Linear["mlp.up"].out, Lora(3, alpha=6.0)))
    assert result.error == 0
    p, v = _random(result, "mlp.up.lora"), result.values
    assert {name: tuple(t.shape) for name, t in p.items()} == {"a": (3, 8), "b": (16, 3)}
    up = v["up"] + 6 / 3 * v["x"] @ p["a"].T @ p["b"].T
    expected = v["x"] + torch.nn.functional.gelu(up) @ result.program.module.get_parameter("mlp.down.weight").T
    assert torch.allclose(result.run()[0], expected, atol=1e-5)


def test_a_bank_adds_the_weighted_sum_of_its_experts() -> None:
    result = done(MLP, Branch(gatecc.MLP[...].out, Loras(3, rank=2, alpha=1.0), GATE))
    assert result.error == 0
    p, v = _random(result, "mlp.loras"), result.values
    router = _random(result, "mlp.branch")
    weights = (v["x"] @ router["weight"].T + router["bias"]).softmax(-1)
    each = [0.5 * v["x"] @ a.T @ b for a, b in zip(p["a"], p["b"], strict=True)]
    expected = v["x"] + v["down"] + sum(w.unsqueeze(-1) * y for w, y in zip(weights.unbind(-1), each, strict=True))
    assert torch.allclose(result.run()[0], expected, atol=1e-5)


def test_a_router_leaves_out_what_it_does_not_choose() -> None:
    router = RouterSpec("in", "linear", "softmax_topk(2)", "random(std=1)")
    result = done(MLP, Branch(gatecc.MLP[...].out, Loras(4, rank=2, alpha=4.0), router=router))
    assert result.error == 0
    p, v = _random(result, "mlp.loras"), result.values
    logits = v["x"] @ result.program.module.get_parameter("mlp.branch.weight").T
    kept = logits >= logits.topk(2, -1).values[..., 1:]
    weights = logits.masked_fill(~kept, -torch.inf).softmax(-1)
    each = torch.stack([2 * v["x"] @ a.T @ b for a, b in zip(p["a"], p["b"], strict=True)], -1)
    expected = v["x"] + v["down"] + (each * weights.unsqueeze(-2)).sum(-1)
    assert torch.allclose(result.run()[0], expected, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_all_at_once_is_one_by_one(gated: bool) -> None:
    x, weights = torch.randn(2, 5, 8), torch.rand(2, 5, 3)
    first, second = torch.randn(3, 8 if gated else 4, 8), torch.randn(3, 4, 6)
    expected = torch.zeros(2, 5, 6)
    for e in range(3):
        h = x @ first[e].T
        h = torch.nn.functional.silu(h[..., :4]) * h[..., 4:] if gated else torch.nn.functional.silu(h)
        expected += weights[..., e : e + 1] * (h @ second[e])
    assert torch.allclose(weighted_sum(x, weights, None, first, second, "silu", gated), expected, atol=1e-5)
    order = torch.rand(10, 3).argsort(-1)  # chosen, all of them, in some order
    chosen = weights.view(10, 3).gather(-1, order)
    assert torch.allclose(weighted_sum(x, chosen, order, first, second, "silu", gated), expected, atol=1e-5)


def test_a_slot_that_is_empty_adds_nothing() -> None:
    x, first, second = torch.randn(4, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    indices = torch.tensor([[0, 1], [1, 2], [2, 2], [2, 0]])  # 2: no expert
    got = weighted_sum(x, torch.ones(4, 2), indices, first, second)
    each = torch.stack([x @ first[0].T @ second[0], x @ first[1].T @ second[1], torch.zeros(4, 8)], 1)
    expected = each.gather(1, indices.unsqueeze(-1).expand(-1, -1, 8)).sum(1)
    assert torch.allclose(got, expected, atol=1e-5)


def test_padding_of_a_rank_stays_zero_in_training() -> None:
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    a[0, 2], b[0, 2] = 0, 0
    for factor in (a, b):
        factor.requires_grad_()
    weighted_sum(torch.randn(4, 8), torch.rand(4, 2), None, a, b).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert float(a.grad[0, 2].abs().sum() + b.grad[0, 2].abs().sum()) == 0
    assert float(a.grad[1, 2].abs().sum()) > 0


def test_what_has_no_channels_at_its_end_is_refused() -> None:
    with pytest.raises(SiteRefusedError, match="maps channels to channels"):
        done(attention(), Branch(gatecc.Attention[...].heads, Lora(2, of="hidden")))


@pytest.mark.parametrize(
    ("body", "gate"),
    [(Lora(), GATE), (Loras(2), GateSpec("in", "linear", "token", "sigmoid")), (Loras(2), None)],
)
def test_a_bank_is_weighed_and_nothing_else_is(body: Lora | Loras, gate: GateSpec | None) -> None:
    with pytest.raises(ArgumentError, match="weighed by a gate over experts or by a router"):
        Branch(gatecc.Linear[...].out, body, gate)
