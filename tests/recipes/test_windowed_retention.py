"""Gated-SwinRMT's gate G1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from tests.recipes.checks import agree, new_parameters, randomise, reverted, zoo
from tests.recipes.tiny import reference, tiny

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(11))


def test_the_gate_is_elementwise_before_the_output_projection() -> None:
    plain = tiny(fused=False)
    model: Any = gatecc.transform(plain, "windowed-retention-gate", (X,), verify=False)
    assert agree(model, plain, X) == 0
    randomise(new_parameters(model, plain).values())

    def at(place: str, layer: int, value: Tensor, **seen: Tensor) -> Tensor:
        if place != "heads":
            return value
        gate = model.blocks[layer].attn.gate
        merged = value.transpose(1, 2).flatten(2) * 2 * torch.sigmoid(seen["x"] @ gate.weight.T + gate.bias)
        return merged.unflatten(-1, (4, 4)).transpose(1, 2)

    assert agree(model, reference(plain, at), X) <= 1e-6
    reverted(model, plain, (X,))


@pytest.mark.parametrize(("name", "export"), [("timm/swin-eager", True), ("hf/vit-sdpa", False)])
def test_real_models(name: str, export: bool) -> None:
    zoo(name, "windowed-retention-gate", export=export)
