"""StepNet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from tests.recipes.checks import agree, causal, new_parameters, randomise, reverted, zoo
from tests.recipes.tiny import reference, tiny

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(8))


def test_the_step_depends_on_both_summaries() -> None:
    plain = tiny(causal=True)
    model: Any = gatecc.transform(plain, gatecc.recipe("stepnet", scorer="mlp(5)"), (X,), verify=False)
    assert agree(model, plain, X) == 0
    randomise(new_parameters(model, plain).values())

    def at(place: str, join: int, value: Tensor, **seen: Tensor) -> Tensor:
        if place != "branch":
            return value
        gate = model.get_submodule(f"blocks.{join // 2}.gate" + ("_1" if join % 2 else ""))
        pooled = torch.cat([seen["skip"].mean(1), value.mean(1)], -1)
        hidden = torch.relu(pooled @ gate.hidden_weight.T + gate.hidden_bias)
        return value * 2 * torch.sigmoid(hidden @ gate.weight.T + gate.bias).unsqueeze(1)

    assert agree(model, reference(plain, at), X) <= 1e-6
    assert not causal(model, X, 4), "a pooled gate sees later tokens, as the recipe says"
    reverted(model, plain, (X,))


@pytest.mark.broad(3)
@pytest.mark.parametrize(
    ("name", "export"), [("torchvision/resnet18", True), ("hf/vit-sdpa", False), ("hf/bert-sdpa", False)]
)
def test_real_models(name: str, export: bool) -> None:
    zoo(name, "stepnet", export=export)
