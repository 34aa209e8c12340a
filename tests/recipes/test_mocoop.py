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


@torch.no_grad()
def test_a_clip_of_transformers_whose_own_image_chooses() -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 39, "bos_token_id": 38}
    vision = {**shape, "image_size": 16, "patch_size": 8}
    plain: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    ids = torch.tensor([[38, 1, 1, 1, 5, 6, 39], [38, 1, 1, 1, 7, 39, 39], [38, 1, 1, 1, 8, 8, 39]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(3, 3, 16, 16)}
    at, to = "head[visual_projection].out", "head[text_projection].in"
    recipe = gatecc.recipe("mocoop", image=at, to=to, tokens=3, groups=4, k=2, sites="embedding[*token_embedding]")
    model: Any = gatecc.transform(plain, recipe, inputs, verify=False)
    randomise(new_parameters(model, plain).values())
    embedding = model.text_model.embeddings.token_embedding
    bank, router = embedding.prompts.prompts, embedding.router
    router.bias.zero_()  # so that the image says what is chosen

    seen: dict[str, list[Tensor]] = {"image": [], "text": []}
    plain.visual_projection.register_forward_hook(lambda _, args, y: seen["image"].append(y))
    plain.text_projection.register_forward_pre_hook(lambda _, args: seen["text"].append(args[0]))
    plain(**inputs)
    top, indices = (seen["image"][0] @ router.weight.T + router.bias).topk(2, -1)
    assert len({tuple(row) for row in indices.tolist()}) > 1
    for slot in range(2):
        prompts = bank[indices[:, slot]]
        handle = plain.text_model.embeddings.token_embedding.register_forward_hook(
            lambda _, args, y, prompts=prompts: torch.cat([y[:, :1], prompts, y[:, 4:]], 1)
        )
        plain(**inputs)
        handle.remove()
    weights = top.softmax(-1)
    features = weights[:, :1] * seen["text"][1] + weights[:, 1:] * seen["text"][2]
    expected = torch.nn.functional.normalize(features @ plain.text_projection.weight.T, dim=-1)
    got = model(**inputs)
    assert torch.allclose(got.text_embeds, expected, atol=1e-5)
    image = torch.nn.functional.normalize(seen["image"][0], dim=-1)
    assert torch.allclose(got.logits_per_image, plain.logit_scale.exp() * image @ expected.T, atol=1e-4)


def test_the_loss_of_the_router_raises_the_two_nearest_templates() -> None:
    similarity = torch.tensor([[0.1, 0.5, 0.3]])
    target = torch.tensor([[0.1, 10.5, 10.3]]).softmax(-1)
    scores = torch.tensor([[1.0, 2.0, -1.0]])
    assert torch.allclose(template_loss(scores, similarity), -(target * scores.log_softmax(-1)).sum())


@pytest.mark.parametrize("wrong", [{"ids": (1,)}, {"groups": 2}, {"tokens": 0}, {"to": gatecc.Head[...].in_}])
def test_prompts_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        Prompts(gatecc.Embedding[...].out, **({"tokens": 2} | wrong))
