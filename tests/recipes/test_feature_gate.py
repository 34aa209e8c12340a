"""The feature gate of TSMixer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from tests.recipes.checks import agree, new_parameters, randomise, reverted, zoo
from tests.recipes.tiny import WIDTH, reference, tiny

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize(("init", "factor"), [("identity", WIDTH), ("paper", 1)])
def test_the_gate_is_a_softmax_over_the_channels(init: str, factor: int) -> None:
    plain = tiny()
    model: Any = gatecc.transform(plain, gatecc.recipe("feature-gate", init=init), (X,), verify=False)
    assert (agree(model, plain, X) == 0) is (init == "identity")
    randomise(new_parameters(model, plain).values(), 0.5)

    def at(place: str, layer: int, value: Tensor, **seen: Tensor) -> Tensor:
        if place != "mlp":
            return value
        gate = model.blocks[layer].mlp.gate
        weights = torch.softmax(value @ gate.weight.T + gate.bias, -1)
        assert torch.allclose(weights.sum(-1), torch.ones(()))
        return value * factor * weights

    assert agree(model, reference(plain, at), X) <= 1e-6
    reverted(model, plain, (X,))


def test_it_is_the_gate_of_patch_tsmixer() -> None:
    transformers = pytest.importorskip("transformers")
    options: dict[str, Any] = dict(context_length=32, patch_length=8, patch_stride=8, num_input_channels=2, d_model=16)
    configs = [
        transformers.PatchTSMixerConfig(**options, num_layers=2, gated_attn=g, dropout=0.0) for g in (True, False)
    ]
    torch.manual_seed(0)
    theirs, ours = (transformers.PatchTSMixerModel(c).eval() for c in configs)
    own = {k: v for k, v in theirs.state_dict().items() if "gating_block" not in k}
    ours.load_state_dict(own)
    inputs = {"past_values": torch.randn(2, 32, 2), "return_dict": False}
    model: Any = gatecc.transform(ours, gatecc.recipe("feature-gate", init="paper"), inputs, verify=False)
    gates = [m.gating_block.attn_layer for m in theirs.modules() if hasattr(m, "gating_block")]
    mine = [m for m in model.modules() if type(m).__name__ == "GateModule"]
    assert len(gates) == len(mine) > 0
    for gate, layer in zip(mine, gates, strict=True):
        gate.load_state_dict(layer.state_dict())
    with torch.no_grad():
        expected, got = theirs(**inputs)[0], model(**inputs)[0]
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(ours(**inputs)[0], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "export"),
    [("hf/llama-sdpa", False), ("hf/bert-sdpa", True), ("timm/vit-sdpa", False), ("timm/mixer", False)],
)
def test_real_models(name: str, export: bool) -> None:
    model = zoo(name, "feature-gate", export=export)
    assert copy.deepcopy(model) is not model
