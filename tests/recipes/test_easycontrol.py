"""EasyControl: what a condition computes is its own, and the image goes through the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from gatecc.errors import ArgumentError
from gatecc.recipes import samples
from tests.recipes.checks import new_parameters, randomise
from tests.recipes.tiny import reference, tiny


@pytest.fixture(scope="module")
def controlled() -> tuple[Any, Any, Tensor, dict[str, Tensor]]:
    plain, ((x,), given) = samples.conditioned()
    model = gatecc.transform(plain, gatecc.recipe("easycontrol", rank=2), ((x,), given), verify=False)
    randomise(new_parameters(model, plain).values(), 0.5)
    return plain, model, x, given


@torch.no_grad()
def test_without_conditions_it_is_the_base(controlled: Any) -> None:
    plain, model, x, given = controlled
    image = {**given, "segment": torch.zeros_like(given["segment"])}
    assert torch.allclose(model(x, **image), plain(x, **image), atol=1e-6)


@torch.no_grad()
def test_conditions_do_not_see_the_image_nor_each_other(controlled: Any) -> None:
    _, model, x, given = controlled
    segment, before = given["segment"], model(x, **given)
    for changed in range(3):
        other = torch.where((segment == changed).unsqueeze(-1), torch.randn_like(x), x)
        moved = (model(other, **given) - before).abs().amax(-1) > 1e-5
        assert bool(moved[segment == 0].all())  # the image sees all
        for kept in {1, 2} - {changed}:
            assert not bool(moved[segment == kept].any())


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_the_equation(fused: bool) -> None:
    plain = tiny(layers=1, fused=fused)
    x, segment = torch.randn(2, 6, 16), torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]])
    recipe = gatecc.recipe("easycontrol", segment="image", sites="linear[*.q_proj]", rank=2)
    model: Any = gatecc.transform(plain, recipe, ((x,), {"image": segment}), verify=False)
    randomise(new_parameters(model, plain).values(), 0.5)
    bank = model.blocks[0].attn.q_proj.loras
    seen: dict[str, Tensor] = {}

    def at(place: str, layer: int, value: Tensor, **given: Tensor) -> Tensor:
        if place == "q":
            each = torch.stack([8 * given["x"] @ a.T @ b for a, b in zip(bank.a, bank.b, strict=True)])
            for c in (1, 2):
                added = torch.where((segment == c).unsqueeze(-1), each[c - 1], 0)
                value = value + added.unflatten(-1, (-1, 4)).transpose(1, 2)
        if place in ("q", "k", "v"):
            seen[place] = value
        if place != "heads":
            return value
        k, v = (seen[name].repeat_interleave(2, 1) for name in ("k", "v"))
        scores = seen["q"] @ k.mT / 2
        visible = (segment[:, :, None] == 0) | (segment[:, :, None] == segment[:, None])
        return scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1) @ v

    assert torch.allclose(model(x, image=segment), reference(plain, at)(x, image=segment), atol=1e-5)


@torch.no_grad()
def test_conditions_are_computed_once_for_all_steps(controlled: Any) -> None:
    _, model, x, given = controlled
    segment = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 2]])
    counted: list[int] = []
    handle = model.blocks[1].mlp.up.register_forward_pre_hook(lambda _, args: counted.append(args[0].size(1)))
    steps = [torch.cat([torch.randn(2, 3, 16), x[:, 3:]], 1) for _ in range(3)]
    others = {name: value for name, value in given.items() if name != "segment"}
    expected = [model(step, segment=segment, **others)[:, :3] for step in steps]
    counted.clear()
    with gatecc.condition_cache(model) as cache:
        got = [model(steps[0], segment=segment, **others)[:, :3]]
        assert counted == [6, 6]  # the second to see that no condition depends on the image
        got += [model(step[:, :3], segment=segment[:, :3], **others) for step in steps[1:]]
        assert counted == [6, 6, 3, 3]
        assert (cache.computed, cache.reused) == (1, 2)
        for one, other in zip(got, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        with pytest.raises(ArgumentError, match="text: conditions were kept"):
            model(steps[1][:, :3], segment=segment[:, :3], **{**others, "text": torch.randn(2, 8)})
    handle.remove()
    assert torch.allclose(model(steps[0], segment=segment, **others)[:, :3], expected[0], atol=1e-6)


@torch.no_grad()
def test_a_cache_of_what_keeps_no_conditions_is_refused(controlled: Any) -> None:
    plain, _, x, given = controlled
    with gatecc.condition_cache(plain), pytest.raises(ArgumentError, match="no attention that keeps conditions"):
        plain(x, **given)
    spelled = tiny(layers=1, fused=False)
    image = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]])
    recipe = gatecc.recipe("easycontrol", segment="image", sites="linear[*.q_proj]", rank=2)
    model = gatecc.transform(spelled, recipe, ((x,), {"image": image}), verify=False)
    with gatecc.condition_cache(model, "image"), pytest.raises(ArgumentError, match="spelled out"):
        model(x, image=image)
