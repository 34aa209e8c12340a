"""PILL's adapters: each token runs that of its modality. The value gate has tests of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import gatecc
from tests.recipes.checks import new_parameters, randomise
from tests.recipes.tiny import reference, tiny

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(9))
IMAGE = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1]], dtype=torch.bool)


def test_a_token_runs_the_adapter_of_its_modality_and_its_values_are_gated() -> None:
    plain = tiny(layers=1)
    recipe = gatecc.recipe("pill", width=4)
    model: Any = gatecc.transform(plain, recipe, ((X,), {"image": IMAGE}), verify=False)
    randomise(new_parameters(model, plain).values(), 0.5)
    bank, gate = model.blocks[0].mlp.adapters, model.blocks[0].attn.gate
    seen: list[torch.Tensor] = []

    def at(place: str, layer: int, value: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        if place == "v":
            g = torch.tanh(given["x"] @ gate.weight.T + gate.bias).transpose(1, 2).unsqueeze(-1)
            return torch.where(IMAGE[:, None, :, None], value * g, value)
        if place == "hidden":
            seen.append(given["x"])
        if place != "mlp":
            return value
        each: list[torch.Tensor] = []
        for e in range(2):
            h = seen[-1] @ bank.down[e].T
            each.append((F.silu(h[..., :4]) * h[..., 4:]) @ bank.up[e])
        return value + torch.where(IMAGE.unsqueeze(-1), each[1], each[0])

    with torch.no_grad():
        assert torch.allclose(model(X, image=IMAGE), reference(plain, at)(X, image=IMAGE), atol=1e-5)
