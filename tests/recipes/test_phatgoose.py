"""PHATGOOSE: both phases, against sums that are written down."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gatecc
from gatecc import adapters
from gatecc.recipes import samples
from tests.recipes.checks import new_parameters, randomise

NAME = "blocks.0.attn.q_proj"
SITES = f"linear[{NAME}]"
PLAIN, IDS = samples.language()


def _trained(seed: int) -> Any:
    """A model of the first phase whose adapter and gate vector are no longer at their start."""
    recipe = gatecc.recipe("phatgoose", sites=SITES, rank=2, phase="gate")
    model = gatecc.transform(PLAIN, recipe, IDS, verify=False)
    new = new_parameters(model, PLAIN).values()
    randomise(new, float(seed))
    return model


@torch.no_grad()
def _by_hand(change: Any) -> Tensor:
    """The base, whose q_proj has change(x) added."""
    model = copy.deepcopy(PLAIN)
    model.get_submodule(NAME).register_forward_hook(lambda module, args, y: y + change(args[0]))
    return model(*IDS)


def _adapter(model: Any, x: Tensor) -> Tensor:
    lora = model.get_submodule(NAME).lora
    return x @ lora.a.T @ lora.b.T * lora.alpha / 2


@torch.no_grad()
def test_the_first_phase_scales_an_adapter_by_a_vector() -> None:
    model = _trained(1)
    vector = model.get_submodule(NAME).vector.weight
    expected = _by_hand(lambda x: torch.sigmoid(x @ vector.T) * _adapter(model, x))
    assert torch.allclose(model(*IDS), expected, atol=1e-5)


@torch.no_grad()
def test_the_second_phase_takes_the_nearest_adapters() -> None:
    trained = [_trained(seed) for seed in (1, 2, 3)]
    model: Any = adapters.load(PLAIN, trained, IDS, recipe="phatgoose", options={"k": 2}, verify=False)

    def change(x: Tensor) -> Tensor:
        vectors = torch.cat([one.get_submodule(NAME).vector.weight for one in trained])
        u, v = F.layer_norm(x, [16]), F.layer_norm(vectors, [16])
        scores = u @ v.T / 4
        scores = scores.masked_fill(scores < scores.topk(2, -1).values[..., -1:], -torch.inf)
        each = torch.stack([_adapter(one, x) for one in trained], -1)
        return (each * scores.softmax(-1).unsqueeze(-2)).sum(-1)

    assert torch.allclose(model(*IDS), _by_hand(change), atol=1e-5)


@torch.no_grad()
def test_one_expert_is_that_adapter_and_another_one_leaves_its_weights_alone() -> None:
    first = _trained(1)
    one: Any = adapters.load(PLAIN, [first], IDS, recipe="phatgoose", options={"k": 1}, verify=False)
    assert torch.allclose(one(*IDS), _by_hand(lambda x: _adapter(first, x)), atol=1e-5)
    two: Any = adapters.load(PLAIN, [first, _trained(2)], IDS, recipe="phatgoose", verify=False)
    small, large = one.get_submodule(NAME), two.get_submodule(NAME)
    assert torch.equal(small.loras.a[0], large.loras.a[0])
    assert torch.equal(small.vector.weight[0], large.vector.weight[0])
