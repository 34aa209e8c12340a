"""MoCoOp and its prompts, against runs of the encoder that are written down."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from gatecc.errors import ArgumentError
from gatecc.passes.branch.prompts import Prompts
from gatecc.recipes import samples
from gatecc.train import template_loss
from tests.recipes.checks import new_parameters, randomise


def _prompted(plain: Any, prompts: Tensor, ids: Tensor, given: dict[str, Tensor]) -> Tensor:
    """What the head reads when tokens 1 and 2 are prompts (B, 2, C)."""
    seen: list[Tensor] = []
    model = copy.deepcopy(plain)
    model.embed.register_forward_hook(lambda _, args, y: torch.cat([y[:, :1], prompts, y[:, 3:]], 1))
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids, **given)
    return seen[0]


@torch.no_grad()
def test_the_image_chooses_two_prompts_and_their_features_are_summed() -> None:
    plain, ((ids,), given) = samples.described()
    recipe = gatecc.recipe("mocoop", image="text", to="head[...].in", tokens=2, groups=3, k=2)
    model: Any = gatecc.transform(plain, recipe, ((ids,), given), verify=False)
    randomise(new_parameters(model, plain).values())
    bank, router = model.embed.prompts.prompts, model.embed.router
    scores = given["text"] @ router.weight.T + router.bias
    top, indices = scores.topk(2, -1)
    weights = top.softmax(-1)
    runs = [_prompted(plain, bank[indices[:, slot]], ids, given) for slot in range(2)]
    features = sum((weights[:, slot, None, None] * runs[slot] for slot in range(2)), torch.zeros(()))
    assert torch.allclose(model(ids, **given), plain.get_submodule("head")(features), atol=1e-5)


@torch.no_grad()
def test_one_group_is_coop_and_starts_from_a_template() -> None:
    plain, ((ids,), given) = samples.described()
    recipe = gatecc.recipe("mocoop", image="text", to="head[...].in", tokens=2, groups=1, ids=(4, 7))
    model: Any = gatecc.transform(plain, recipe, ((ids,), given), verify=False)
    template = ids.clone()
    template[:, 1:3] = torch.tensor([4, 7])
    assert torch.allclose(model(ids, **given), plain(template, **given), atol=1e-6)
    assert torch.equal(model.embed.prompts.prompts[0], plain.get_parameter("embed.weight")[[4, 7]])


def test_the_loss_of_the_router_raises_the_two_nearest_templates() -> None:
    similarity = torch.tensor([[0.1, 0.5, 0.3]])
    target = torch.tensor([[0.1, 10.5, 10.3]]).softmax(-1)
    scores = torch.tensor([[1.0, 2.0, -1.0]])
    assert torch.allclose(template_loss(scores, similarity), -(target * scores.log_softmax(-1)).sum())


@pytest.mark.parametrize("wrong", [{"ids": (1,)}, {"groups": 2}, {"tokens": 0}, {"to": gatecc.Head[...].in_}])
def test_prompts_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        Prompts(gatecc.Embedding[...].out, **({"tokens": 2} | wrong))
