"""Route: dense feed-forward layers of real models become experts that start as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import ArgumentError, EmptySelectionError, SiteRefusedError
from gatecc.ir.router import RouterSpec
from gatecc.passes.route.copies import Copies
from gatecc.passes.route.route import Route


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return llama()


@pytest.fixture(scope="module")
def routed(dense: nn.Module) -> nn.Module:
    return gatecc.transform(dense, "upcycle", {"input_ids": IDS}, verify=False)


def test_starts_as_the_dense_model(dense: nn.Module, routed: nn.Module) -> None:
    with torch.no_grad():
        before, after = dense(input_ids=IDS).logits, routed(input_ids=IDS).logits
    assert float((after - before).norm() / before.norm()) < 3e-7


def test_parameters_are_named_as_in_transformers(routed: nn.Module) -> None:
    state = routed.state_dict()
    mlp = "model.layers.1.mlp."
    assert {n.removeprefix(mlp): tuple(t.shape) for n, t in state.items() if n.startswith(mlp)} == {
        "router.weight": (8, 32),
        "experts.gate_up_proj": (8, 96, 32),
        "experts.down_proj": (8, 32, 48),
    }


def test_each_layer_holds_its_own_weights(dense: nn.Module, routed: nn.Module) -> None:
    for layer in ("model.layers.0.mlp", "model.layers.1.mlp"):
        mlp: Any = dense.get_submodule(layer)
        experts: Any = routed.get_submodule(f"{layer}.experts")
        rows = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        assert torch.equal(experts.gate_up_proj, rows.expand(8, -1, -1))
        assert torch.equal(experts.down_proj, mlp.down_proj.weight.expand(8, -1, -1))


def test_experts_differ_where_their_weights_do(routed: nn.Module) -> None:
    model = copy.deepcopy(routed)
    mlp: Any = model.get_submodule("model.layers.0.mlp")
    with torch.no_grad():
        mlp.experts.gate_up_proj.copy_(torch.randn(8, 96, 32) * 0.2)
        mlp.router.weight.copy_(torch.randn(8, 32))
    x = torch.randn(2, 5, 32)
    weights, indices = torch.topk(torch.softmax(x.flatten(0, 1) @ mlp.router.weight.T, -1), 2)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.zeros(10, 32)
    for t, xt in enumerate(x.flatten(0, 1)):
        for w, e in zip(weights[t], indices[t], strict=True):
            gate, up = (mlp.experts.gate_up_proj[e] @ xt).chunk(2)
            expected[t] += w * (mlp.experts.down_proj[e] @ (nn.functional.silu(gate) * up))
    assert torch.allclose(mlp(x), expected.view(2, 5, 32), atol=1e-6)


def test_a_hook_on_a_router_sees_and_changes_what_it_chose(dense: nn.Module, routed: nn.Module) -> None:
    model = copy.deepcopy(routed)
    mlp: Any = model.get_submodule("model.layers.0.mlp")
    x, seen = torch.randn(2, 5, 32), list[Any]()
    with torch.no_grad():
        before = mlp(x)
        handle = mlp.router.register_forward_hook(lambda module, given, chosen: seen.append(chosen))
        assert torch.equal(mlp(x), before)
        handle.remove()
        weights, indices = torch.topk(torch.softmax(x.flatten(0, 1) @ mlp.router.weight.T, -1), 2)
        torch.testing.assert_close(seen[0][0], weights / weights.sum(-1, keepdim=True))
        assert torch.equal(seen[0][1], indices)
        mlp.router.register_forward_hook(lambda module, given, chosen: chosen._replace(weights=chosen.weights * 2))
        torch.testing.assert_close(mlp(x), before * 2)


def test_reverts_bitwise(dense: nn.Module, routed: nn.Module) -> None:
    state = gatecc.revert(routed).state_dict()
    assert list(state) == list(dense.state_dict())
    assert all(torch.equal(state[name], t) for name, t in dense.state_dict().items())


def test_refuses_more_choices_than_experts(dense: nn.Module) -> None:
    with pytest.raises(ArgumentError, match="k=3 of 2"):
        gatecc.transform(dense, Route("mlp[...]", RouterSpec(choice="softmax_topk(3)"), Copies(2)), {"input_ids": IDS})


class _MLP(nn.Module):
    """x: (B, N, 8) -> (B, N, 8)"""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.up, self.between, self.down = nn.Linear(8, 16), between, nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(self.up(x)))


class _Then(nn.Module):
    """An activation, and something that numbers of usual size and the example's tokens do not show."""

    def __init__(self, activation: nn.Module, then: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.activation, self.then = activation, then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(self.activation(x))


@pytest.mark.parametrize(
    ("between", "found"),
    [
        (nn.Hardsigmoid(), r"activation hardsigmoid; the nearest formula, \w+ \(plain\), differs by"),
        (nn.Sequential(nn.GELU(), nn.LayerNorm(16)), "it reads between.1.weight beside its input"),
        (_Then(nn.GELU(), lambda h: h.clamp(-7, 7)), r"with numbers of 1e\+02 it differs by .* from gelu"),
        (_Then(nn.SiLU(), lambda h: 1e6 * (h / 1e6).tanh()), r"with numbers of 2e\+07 it differs by .* from silu"),
        (_Then(nn.GELU(), lambda h: h * (h.numel() / 96)), "the sizes are free, and at .* tokens it differs by"),
        (_Then(nn.GELU(), lambda h: h.nan_to_num()), r"are not finite are treated inside of it \(nan_to_num\)"),
        (_Then(nn.GELU(), lambda h: h.detach()), r"gradients are stopped inside of it \(detach\)"),
    ],
)
def test_refuses_what_is_no_plain_ffn(between: nn.Module, found: str) -> None:
    with pytest.raises((SiteRefusedError, EmptySelectionError), match=found):
        gatecc.transform(_MLP(between).eval(), "upcycle", (torch.randn(2, 3, 8),))
