"""The value gate of PILL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from tests.recipes.checks import agree, new_parameters, randomise, reverted, zoo
from tests.recipes.tiny import reference, tiny

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(9))
IMAGE = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1]], dtype=torch.bool)
INPUTS = ((X,), {"image": IMAGE})


def _by_hand(model: Any, activation: Any) -> Any:
    def at(place: str, layer: int, value: Tensor, **seen: Tensor) -> Tensor:
        if place != "v":
            return value
        gate = model.blocks[layer].attn.gate
        g = activation(seen["x"] @ gate.weight.T + gate.bias).transpose(1, 2).unsqueeze(-1)
        return torch.where(IMAGE[:, None, :, None], value * g, value)

    return at


@pytest.mark.parametrize(("activation", "function"), [("tanh", torch.tanh), ("1+tanh", lambda z: 1 + torch.tanh(z))])
def test_only_image_tokens_are_gated(activation: str, function: Any) -> None:
    plain = tiny()
    recipe = gatecc.recipe("value-gate", where="image", activation=activation)
    model: Any = gatecc.transform(plain, recipe, INPUTS, verify=False)
    randomise(new_parameters(model, plain).values())
    hand = reference(plain, _by_hand(model, function))
    with torch.no_grad():
        assert torch.allclose(model(X, image=IMAGE), hand(X, image=IMAGE), atol=1e-6)
        assert (
            torch.equal(
                model(X, image=~IMAGE | IMAGE), gatecc.transform(plain, recipe, INPUTS, verify=False)(X, image=IMAGE)
            )
            is False
        )
    reverted(model, plain, (X,), {"image": IMAGE})


def test_it_starts_with_image_values_of_zero_which_is_not_the_text_alone() -> None:
    plain = tiny(layers=2)
    model: Any = gatecc.transform(plain, gatecc.recipe("value-gate", where="image"), INPUTS, verify=False)
    seen: dict[str, Tensor] = {}

    def at(place: str, layer: int, value: Tensor, **_: Tensor) -> Tensor:
        if place == "v":
            return value * ~IMAGE[:, None, :, None]
        if place == "heads" and layer == 0:
            seen["heads"] = value
        return value

    hand = reference(plain, at)
    with torch.no_grad():
        assert torch.allclose(model(X, image=IMAGE), hand(X, image=IMAGE), atol=1e-6)


def test_without_a_mask_all_values_are_gated_and_identity_reports_its_residual() -> None:
    plain = tiny()
    recipe = gatecc.recipe("value-gate", init="identity")
    model = gatecc.transform(plain, recipe, (X,), verify=False)
    assert str(recipe.rewrites[0].contract()) == f"identity_at_init({1 - torch.tanh(torch.tensor(6.0)):g})"
    assert 0 < agree(model, plain, X) < 1e-4
    exact = gatecc.transform(plain, gatecc.recipe("value-gate", activation="1+tanh", init="identity"), (X,))
    assert agree(exact, plain, X) == 0


@pytest.mark.parametrize(
    ("name", "options", "export"),
    [
        ("hf/llama-sdpa", {}, True),
        ("hf/vit-sdpa", {}, False),
        ("hf/gpt2-eager", {}, False),
    ],
)
def test_real_models(name: str, options: dict[str, Any], export: bool) -> None:
    zoo(name, "value-gate", export=export, activation="1+tanh", init="identity", **options)


def test_bert_gates_the_tokens_of_its_second_segment() -> None:
    from tests.recipes.checks import case

    known = case("hf/bert-sdpa")
    ids = torch.randint(5, 90, (2, 8))
    segment = (torch.arange(8) > 3).long().expand(2, 8).contiguous()
    inputs = {"input_ids": ids, "token_type_ids": segment}
    recipe = gatecc.recipe("value-gate", where="token_type_ids", activation="1+tanh", init="identity")
    model = gatecc.transform(known.model, recipe, inputs, verify=False)
    randomise(new_parameters(model, known.model).values())
    with torch.no_grad():
        first = {"input_ids": ids, "token_type_ids": torch.zeros_like(segment)}
        assert torch.allclose(model(**first)[0], known.model(**first)[0], atol=1e-6)
        assert not torch.allclose(model(**inputs)[0], known.model(**inputs)[0], atol=1e-3)
