"""ArmoRM: objectives that the prompt weighs."""

from __future__ import annotations

from typing import Any

import torch

import gatecc
from gatecc.recipes import samples
from tests.recipes.checks import new_parameters, randomise


@torch.no_grad()
def test_the_prompt_weighs_the_objectives() -> None:
    plain, inputs = samples.prompted()
    (ids,), kwargs = inputs
    recipe = gatecc.recipe("armorm", hidden=8, penalty_of=1, init="zero", scale=2.0)
    model: Any = gatecc.transform(plain, recipe, inputs, verify=False)
    randomise(new_parameters(model, plain).values(), 0.5)
    gate = model.head.objectives
    model.head.penalties.penalty.copy_(torch.linspace(0, 1, 32))
    seen: list[torch.Tensor] = []
    handle = plain.get_submodule("head").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    r = plain(ids)
    handle.remove()
    h = seen[0][torch.arange(2), kwargs["prompt"]]
    for layer in ("hidden", "hidden_1", "hidden_2"):
        h = torch.relu(h @ getattr(gate, f"{layer}_weight").T + getattr(gate, f"{layer}_bias"))
    g = 2.0 * ((h @ gate.weight.T + gate.bias) / 10).softmax(-1)
    assert torch.allclose(g.sum(-1), torch.full((2,), 2.0))
    penalised = r - torch.linspace(0, 1, 32) * r[..., 1:2]
    scores = model(ids, **kwargs)
    assert torch.allclose(scores, penalised * g.unsqueeze(1), atol=1e-5)

    other = ids.clone()  # another response: the weights stay
    other[0, 4:] = (other[0, 4:] + 1) % 32
    changed = plain(other) - torch.linspace(0, 1, 32) * plain(other)[..., 1:2]
    assert torch.allclose(model(other, **kwargs), changed * g.unsqueeze(1), atol=1e-5)
