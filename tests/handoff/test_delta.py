"""Delta rules in the terms of Qwen3-Next: what it lacks is refused by name. What fits is compared in test_handoff."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import ArgumentError
from gatecc.handoff.delta import DeltaNet, delta_net, with_gate
from gatecc.handoff.linear_layers import delta_options, with_deltas
from gatecc.handoff.source import Source
from gatecc.handoff.unfit import UnfitError
from gatecc.passes.gate import Gate
from gatecc.passes.mix.mix import Mix
from gatecc.passes.mix.mixers.base import Place
from gatecc.passes.mix.mixers.linear import Linear

transformers: Any = pytest.importorskip("transformers")

HEADS, KV_HEADS, SIZE, WIDTH = 4, 2, 8, 16
PLACE = Place(dim=WIDTH, heads=HEADS, kv_heads=KV_HEADS, key=SIZE, value=SIZE, scale=1.0, causal=True)


def converted(**options: Any) -> tuple[nn.Module, Mix, Gate | None]:
    """A module with the mixer of a recipe, and a gate of the sizes of its heads."""
    mix, *gates = gatecc.recipe("gated-delta-net", **{"form": "qwen3-next", **options}).rewrites
    layer = nn.Module()
    assert isinstance(mix, Mix)
    layer.mixer = mix.mixer.module(PLACE)
    layer.gate = nn.Linear(WIDTH, HEADS * SIZE, bias=False)
    gate = gates[0] if gates else None
    assert gate is None or isinstance(gate, Gate)
    if gate is not None:
        vars(layer.gate)["activation"] = gate.gate.activation
    return layer, mix, gate


def net(**options: Any) -> DeltaNet:
    layer, mix, gate = converted(**options)
    found = delta_net(layer, mix)
    return found if gate is None else with_gate(found, layer, gate)


def source(found: DeltaNet, layers: int = 2, **config: Any) -> Source:
    """A model whose first layer was converted."""
    sizes = {"vocab_size": 9, "hidden_size": WIDTH, "intermediate_size": 8, "head_dim": SIZE}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_hidden_layers": layers}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads, **config))
    name = "model.layers.0.self_attn"
    return Source(model, "ForCausalLM", deltas={name: found}, rest=dict(model.state_dict()))


def test_sizes_are_those_of_the_class() -> None:
    """Keys and values are shared by query heads: each gets its own."""
    made = source(net(conv=3))
    options = delta_options(made)
    config = transformers.Qwen3NextConfig(hidden_size=WIDTH, num_hidden_layers=2, **options)
    layer = transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0)
    state = {n: x for n, x in with_deltas(made, made.rest).items() if "layers.0.linear_attn." in n}
    assert {n.rpartition("linear_attn.")[2]: x.shape for n, x in state.items()} == {
        n: x.shape for n, x in layer.state_dict().items()
    }
    assert not any("layers.0.self_attn" in n for n in with_deltas(made, made.rest))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"form": "published"}, "in the place of gated-delta-net"), ({"conv": 0}, "in the place of gated-delta-net")],
)
def test_mixers_that_no_architecture_has(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnfitError, match=reason):
        net(**options)


def test_gates_that_no_architecture_has() -> None:
    layer, mix, gate = converted()
    assert gate is not None
    found = delta_net(layer, mix)
    for spec in (
        gatecc.GateSpec("hidden", "linear(bias=False)"),
        gatecc.GateSpec("hidden", activation="silu", init="random(0.1)"),
    ):
        with pytest.raises(UnfitError, match="in the place of silu"):
            with_gate(found, layer, replace(gate, gate=spec))
    with pytest.raises(UnfitError, match="one plain SiLU"):
        with_gate(with_gate(found, layer, gate), layer, gate)


def test_models_that_the_class_is_not() -> None:
    with pytest.raises(UnfitError, match="eps=1e-06"):
        delta_options(source(net(eps=1e-5)))
    with pytest.raises(UnfitError, match="output gate"):
        delta_options(source(net(gate=False)))
    with pytest.raises(UnfitError, match="keep=0"):
        delta_options(source(net(), layers=1))
    with pytest.raises(UnfitError, match="SiLU and gelu"):
        delta_options(source(net(), hidden_act="gelu"))
    made = source(net())
    made.deltas["model.layers.1.self_attn"] = net(conv=2)
    with pytest.raises(UnfitError, match="are alike"):
        delta_options(made)


def test_queries_and_keys_are_read_before_their_norms() -> None:
    assert Linear(linear=True).operands == ("q_linear", "k_linear", "v")
    with pytest.raises(ArgumentError, match="rope"):
        Linear(linear=True, rope=True)


def test_unit_vectors_are_smooth_at_zero() -> None:
    """x / sqrt(|x|^2 + 1e-6), as transformers' l2norm."""
    from gatecc.passes.mix.mixers.features import UnitMap

    theirs = transformers.models.qwen3_next.modeling_qwen3_next.l2norm
    x = torch.tensor([[0.0, 0.0], [3e-4, 4e-4], [3.0, 4.0]])
    torch.testing.assert_close(UnitMap(smooth=True)(x), theirs(x))
