"""Gated attention: five positions, two granularities, three starts, and the gate inside the query projection."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import SiteRefusedError
from tests.recipes.checks import agree, case, causal, cost, new_parameters, randomise, reverted, zoo
from tests.recipes.tiny import HEAD, HEADS, Tiny, reference, tiny

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("granularity", ["head", "element"])
@pytest.mark.parametrize("position", ["heads", "q", "k", "v", "out"])
def test_every_position_is_the_gate_written_by_hand(position: str, granularity: str) -> None:
    plain = tiny(causal=True)
    model = gatecc.transform(
        plain, gatecc.recipe("gated-attention", position=position, granularity=granularity), (X,), verify=False
    )
    assert agree(model, plain, X) == 0
    randomise(new_parameters(model, plain).values())
    assert agree(model, reference(plain, _by_hand(model, position)), X) <= 1e-6
    assert agree(model, reference(plain, _by_hand(model, position)), torch.randn(3, 9, 16)) <= 1e-6
    assert causal(model, X, 4)
    reverted(model, plain, (X,))


def _by_hand(model: Any, position: str) -> Any:
    def at(place: str, layer: int, value: Tensor, **seen: Tensor) -> Tensor:
        if place != position:
            return value
        gate = model.get_submodule(f"blocks.{layer}.attn.gate")
        g = 2 * torch.sigmoid(seen["x"] @ gate.weight.T + gate.bias)
        if place == "out":
            return value * g
        return value * g.unflatten(-1, (value.size(1), -1)).transpose(1, 2)

    return at


@pytest.mark.parametrize(
    ("name", "export"),
    [("hf/llama-sdpa", True), ("hf/gpt2-eager", False), ("hf/vit-sdpa", False)],
)
def test_real_models(name: str, export: bool) -> None:
    zoo(name, "gated-attention", export=export)


def _hooked(plain: nn.Module, gated: nn.Module, attention: str, inner: str, outer: str) -> nn.Module:
    """The plain model with the gate applied in Python: hooks on the modules around the attention core."""
    model = copy.deepcopy(plain)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] != attention:
            continue
        gate = gated.get_submodule(f"{name}.gate")
        seen: dict[str, Tensor] = {}

        def remember(_: nn.Module, args: Any, seen: dict[str, Tensor] = seen) -> None:
            seen["x"] = args[0]

        def apply(_: nn.Module, args: Any, seen: dict[str, Tensor] = seen, gate: Any = gate) -> tuple[Tensor]:
            g = 2 * torch.sigmoid(seen["x"] @ gate.weight.T + gate.bias)
            return (args[0] * g.repeat_interleave(args[0].size(-1) // g.size(-1), -1),)

        module.get_submodule(inner).register_forward_pre_hook(remember)
        module.get_submodule(outer).register_forward_pre_hook(apply)
    return model


@pytest.mark.parametrize(
    ("name", "granularity", "places"),
    [
        ("hf/llama-sdpa", "head", ("self_attn", "q_proj", "o_proj")),
        ("hf/gpt2-eager", "element", ("attn", "c_attn", "c_proj")),
    ],
)
def test_random_gates_equal_hooks_and_generate_the_same_tokens(
    name: str, granularity: str, places: tuple[str, ...]
) -> None:
    known = case(name)
    model: Any = gatecc.transform(
        known.model, gatecc.recipe("gated-attention", granularity=granularity), known.inputs, verify=False
    )
    randomise(new_parameters(model, known.model).values())
    hooked: Any = _hooked(known.model, model, *places)
    ids = known.kwargs["input_ids"] if "input_ids" in known.kwargs else known.args[0]
    with torch.no_grad():
        assert float((model(ids).logits - hooked(ids).logits).abs().max()) <= 1e-5
        for m in (model, hooked):
            m.config.use_cache = True
            m.generation_config.use_cache = True
        options: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(model.generate(ids, **options), hooked.generate(ids, **options))


# --- the start --------------------------------------------------------------------------------------------------------


def test_a_folded_start_keeps_a_plain_sigmoid_and_doubles_the_next_linear() -> None:
    plain = tiny()
    model: Any = gatecc.transform(
        plain, gatecc.recipe("gated-attention", init="identity(how=fold)"), (X,), verify=False
    )
    own = plain.get_parameter("blocks.0.attn.o_proj.weight")
    assert agree(model, plain, X) == 0
    assert torch.equal(model.blocks[0].attn.o_proj.weight, 2 * own)
    again: Any = gatecc.transform(model, gatecc.recipe("feature-gate"), (X,), verify=False)
    assert torch.equal(again.blocks[0].attn.o_proj.weight, 2 * own), "a second transform folds nothing twice"
    attention: Any = gatecc.transform(model, gatecc.recipe("gated-attention", position="out"), (X,), verify=False)
    assert torch.equal(attention.blocks[0].attn.o_proj.weight, 2 * own)
    assert agree(attention, plain, X) <= 1e-6
    reverted(attention, plain, (X,))


def test_a_biased_start_reports_its_residual() -> None:
    plain = tiny()
    recipe = gatecc.recipe("gated-attention", init="identity(how=bias, bias=4)")
    model = gatecc.transform(plain, recipe, (X,))
    residual = 1 - torch.sigmoid(torch.tensor(4.0))
    assert str(recipe.rewrites[0].contract()) == f"identity_at_init({residual:g})"
    assert 1e-3 < agree(model, plain, X) < 4 * 2 * residual


def test_the_cost_is_one_matrix_product_and_one_multiplication_a_layer() -> None:
    model = gatecc.transform(tiny(), gatecc.recipe("gated-attention"), (X,), verify=False)
    assert cost(model) == 2 * (2 * 2 * 6 * 16 * HEADS)


# --- inside the query projection --------------------------------------------------------------------------------------


def _fused(plain: nn.Module, granularity: str = "head", **options: Any) -> Any:
    recipe = gatecc.recipe("gated-attention", granularity=granularity, fuse_into="q", **options)
    return gatecc.transform(plain, recipe, (X,), verify=False)


@pytest.mark.parametrize("granularity", ["head", "element"])
def test_fused_rows_are_those_of_a_separate_linear(granularity: str) -> None:
    plain = tiny(causal=True)
    apart: Any = gatecc.transform(plain, gatecc.recipe("gated-attention", granularity=granularity), (X,), verify=False)
    fused = _fused(plain, granularity)
    assert not new_parameters(fused, plain)
    assert agree(fused, plain, X) == 0
    groups, old, new = 2, 2 * HEAD, 2 * (1 if granularity == "head" else HEAD)
    for layer in range(2):
        gate, wide = apart.blocks[layer].attn.gate, fused.blocks[layer].attn.q_proj
        assert wide.weight.shape == (groups * (old + new), 16)
        assert wide.out_features == groups * (old + new)
        with torch.no_grad():
            gate.weight.normal_()
            wide.weight.view(groups, old + new, 16)[:, old:] = gate.weight.view(groups, new, 16)
    assert agree(fused, apart, X) <= 1e-6
    assert agree(fused, apart, torch.randn(3, 9, 16)) <= 1e-6
    loss = fused(X).square().mean()
    loss.backward()
    assert float(fused.blocks[0].attn.q_proj.weight.grad.view(groups, old + new, 16)[:, old:].abs().sum()) > 0


def test_fused_gates_survive_new_kinds_of_calls_copies_and_files() -> None:
    plain = tiny()
    fused = _fused(plain)
    with torch.no_grad():
        for block in fused.blocks:
            block.attn.q_proj.weight.view(2, 10, 16)[:, 8:].normal_()
    expected = fused(X)
    assert agree(fused, plain, X) > 1e-3
    with torch.no_grad():  # a kind of call that has to be captured: the own forward runs on its own rows
        assert torch.allclose(fused(X), expected, atol=1e-6)
    assert torch.allclose(fused.train()(X), expected, atol=1e-6)
    fused.eval()
    assert fused.blocks[0].attn.q_proj.weight.shape == (20, 16)
    assert torch.equal(copy.deepcopy(fused)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(X), expected)
    other = _fused(tiny())
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(X), expected)
    reverted(fused, plain, (X,))


def test_a_second_transform_keeps_fused_gates() -> None:
    plain = tiny()
    fused = _fused(plain)
    with torch.no_grad():
        fused.blocks[1].attn.q_proj.weight.view(2, 10, 16)[:, 8:].normal_()
    both: Any = gatecc.transform(fused, gatecc.recipe("gated-attention", position="out"), (X,), verify=False)
    assert both.blocks[0].attn.q_proj.weight.shape == (20, 16)
    assert agree(both, fused, X) <= 1e-6
    reverted(both, plain, (X,))


def test_fused_gates_on_a_language_model_with_a_cache() -> None:
    known = case("hf/llama-sdpa")
    model: Any = gatecc.transform(known.model, gatecc.recipe("gated-attention", fuse_into="q_proj"), known.inputs)
    ids = torch.randint(5, 90, (2, 7))
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight
        rows = weight.shape[0] // groups
        with torch.no_grad():
            weight.view(groups, rows, -1)[:, rows - heads // groups :].normal_()
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        past = model(ids[:, :4], use_cache=True).past_key_values
        rest = model(ids[:, 4:], past_key_values=past, use_cache=True).logits
    assert float((full[:, 4:] - rest).abs().max()) <= 1e-4
    assert float((full - known.model(ids).logits).abs().max()) > 1e-3
    reverted(model, known.model, (ids,), {"use_cache": False})


def test_a_projection_that_cannot_take_the_rows_is_refused_and_nothing_changes() -> None:
    known = case("hf/gpt2-eager")
    model = copy.deepcopy(known.model)
    with pytest.raises(SiteRefusedError, match="shared with other roles") as error:
        gatecc.transform(model, gatecc.recipe("gated-attention", fuse_into="q"), known.inputs, inplace=True)
    assert "leave fuse_into out" in str(error.value)
    assert model.state_dict().keys() == known.model.state_dict().keys()
    with pytest.raises(SiteRefusedError, match="no bias"):
        _fused(tiny(), init="identity(how=bias)")


def test_a_failure_after_widening_leaves_the_weights_as_they_were() -> None:
    plain: Any = tiny()
    before = {name: p.clone() for name, p in plain.state_dict().items()}
    weight = plain.blocks[0].attn.q_proj.weight
    wrong = gatecc.Gate(
        gatecc.Attention[...].heads,
        gatecc.GateSpec("hidden", "linear", "head", "sigmoid", init="identity", fuse_into="q"),
    )
    broken = gatecc.Gate(gatecc.MLP[...].out, gatecc.GateSpec("self", "linear", "head"))
    with pytest.raises(gatecc.GateccError):
        gatecc.transform(plain, [wrong, broken], (X,), inplace=True)
    assert plain.blocks[0].attn.q_proj.weight is weight
    assert all(torch.equal(p, before[name]) for name, p in plain.state_dict().items())
    assert type(plain) is Tiny
