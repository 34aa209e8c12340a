"""MM-DREX: softmax weights over all real models."""

from __future__ import annotations

from typing import Any

import torch

import gatecc
from tests.passes.ensemble.models import TEXT, by_hand, calls_of, texts


def test_weights_sum_to_one_and_one_hot_is_an_expert() -> None:
    model: Any = gatecc.transform(texts(), gatecc.recipe("mm-drex", hidden=8), TEXT, verify=False)
    with torch.no_grad():
        model.router.weight.normal_()
        model.router.bias.zero_()
        prompt = model.features["prompt"](TEXT["input_ids"]).mean(1)
        hidden = torch.relu(prompt @ model.router.hidden_weight.T + model.router.hidden_bias)
        weights = torch.softmax(hidden @ model.router.weight.T, -1)
        assert torch.allclose(model(**TEXT).logits, by_hand(texts(), weights, **TEXT), atol=1e-6)
        chosen = model.router(torch.zeros(5), model.features["prompt"](TEXT["input_ids"]))
        assert torch.allclose(chosen.weights.sum(-1), torch.ones(5), atol=1e-6)
        assert torch.allclose(chosen.weights, weights, atol=1e-6)
        model.router.weight.zero_()
        model.router.bias.copy_(torch.tensor([0.0, 200.0]))
        with calls_of(model) as calls:
            assert torch.equal(model(**TEXT).logits, texts().members["distil"](**TEXT).logits)
        assert calls == {"bert": [], "distil": [5]}
