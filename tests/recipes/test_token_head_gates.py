"""LINA's constants for each token and head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from gatecc.errors import SiteRefusedError
from tests.recipes.checks import agree, new_parameters, randomise, reverted, zoo
from tests.recipes.tiny import KV_HEADS, reference, tiny

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(10))


def test_keys_and_values_have_a_constant_for_each_place() -> None:
    plain = tiny()
    model: Any = gatecc.transform(plain, "token-head-gates", (X,), verify=False)
    assert agree(model, plain, X) == 0
    new = new_parameters(model, plain)
    assert {tuple(p.shape) for p in new.values()} == {(6, KV_HEADS)}
    swapped = X[:, torch.tensor([1, 0, 2, 3, 4, 5])]
    with torch.no_grad():
        assert torch.allclose(model(swapped)[:, 0], model(X)[:, 1], atol=1e-5), "all ones: no token has a place"
    randomise(new.values())

    def at(place: str, layer: int, value: Tensor, **seen: Tensor) -> Tensor:
        if place not in "kv":
            return value
        gate = getattr(model.blocks[layer].attn, "kappa" if place == "k" else "nu")
        return value * gate.weight.T.unsqueeze(-1)

    assert agree(model, reference(plain, at), X) <= 1e-6
    with torch.no_grad():
        assert not torch.allclose(model(swapped)[:, 0], model(X)[:, 1], atol=1e-3)
    assert agree(model, reference(plain, at), X[:1]) <= 1e-6, "another batch size is fine"
    reverted(model, plain, (X,))


def test_other_lengths_are_refused() -> None:
    model = gatecc.transform(tiny(), "token-head-gates", (X,), verify=False)
    with pytest.raises(SiteRefusedError, match="another number of tokens") as error:
        model(torch.randn(2, 5, 16))
    assert "the length that it was transformed with" in str(error.value)


@pytest.mark.parametrize(("name", "export"), [("hf/bert-sdpa", True), ("hf/vit-sdpa", False), ("hf/gpt2-eager", False)])
def test_real_models(name: str, export: bool) -> None:
    zoo(name, "token-head-gates", grow=False, export=export)
