"""A model for one task: the router of that task, and the experts that its data use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError
from gatecc.recipes import samples


def scrambled(**options: Any) -> tuple[Any, tuple[Any, dict[str, Tensor]]]:
    torch.manual_seed(0)
    model, inputs = samples.conditioned()
    recipe = gatecc.recipe("m3vit", experts=6, k=2, init="random(std=1)", **options)
    routed = gatecc.transform(model, recipe, inputs)
    with torch.no_grad():
        for name, p in routed.named_parameters():
            if "experts" in name:
                p.add_(torch.randn_like(p) * 0.1)
    return routed.eval(), inputs


@pytest.fixture(scope="module")
def by_task() -> tuple[Any, tuple[Any, dict[str, Tensor]]]:
    return scrambled(tasks=3)


def met(model: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> list[int]:
    """The experts that a call reaches."""
    found: list[Tensor] = []
    router = model.get_submodule("blocks.1.mlp.router")
    hook = router.register_forward_hook(lambda _m, _i, out: found.append(out[1]))
    model(*args, **kwargs)
    hook.remove()
    return found[0].unique().tolist()


def test_one_task_is_its_router_and_the_experts_that_it_uses(by_task: Any, tmp_path: Path) -> None:
    model, (args, kwargs) = by_task
    of_task = {**kwargs, "task": torch.tensor([1, 1])}
    used = met(model, args, of_task)
    assert len(used) < 6
    alone: Any = gatecc.specialise(model, [(args, kwargs)], {"task": 1})
    old, new = model.blocks[1].mlp, alone.blocks[1].mlp
    rows = [*used, *(6 + e for e in used)]  # the noise has rows of its own
    assert torch.equal(new.router.weight, old.router.weight[1][rows])
    for name, parameter in new.experts.named_parameters():
        assert torch.equal(parameter, getattr(old.experts, name)[used])
    assert sum(p.numel() for p in alone.parameters()) < sum(p.numel() for p in model.parameters())
    rest = {name: value for name, value in kwargs.items() if name != "task"}
    with torch.no_grad():
        expected = model(*args, **of_task)
        assert torch.allclose(alone(*args, **rest), expected, atol=1e-5)
        gatecc.save(alone, tmp_path / "alone")
        loaded = gatecc.load(samples.conditioned()[0], tmp_path / "alone")
        assert torch.equal(loaded(*args, **rest), alone(*args, **rest))


def test_with_all_experts_it_is_the_model_on_any_input(by_task: Any) -> None:
    model, (args, kwargs) = by_task
    alone = gatecc.specialise(model, [(args, kwargs)], {"task": 2}, experts="all")
    x = torch.randn(2, 6, args[0].size(-1)) * 3
    of_task = {**kwargs, "task": torch.tensor([2, 2])}
    with torch.no_grad():
        assert torch.allclose(alone(x, **kwargs), model(x, **of_task), atol=1e-5)


def test_an_embedding_becomes_the_bias_of_the_router() -> None:
    model, (args, kwargs) = scrambled(per="embedding", task="text")
    text = torch.randn(8)
    alone: Any = gatecc.specialise(model, [(args, kwargs)], {"text": text})
    weight = model.blocks[1].mlp.router.weight
    used = met(model, args, {**kwargs, "text": text.expand(2, 8)})
    rows = [*used, *(6 + e for e in used)]
    assert torch.allclose(alone.blocks[1].mlp.router.bias, (weight[:, -8:] @ text)[rows], atol=1e-6)
    assert torch.equal(alone.blocks[1].mlp.router.weight, weight[rows, :-8])


def test_refused_by_name(by_task: Any) -> None:
    model, (args, kwargs) = by_task
    with pytest.raises(ArgumentError, match="no router that reads text"):
        gatecc.specialise(model, [(args, kwargs)], {"text": torch.zeros(8)})
    with pytest.raises(ArgumentError, match="no batch"):
        gatecc.specialise(model, [], {"task": 1})
    with pytest.raises(ArgumentError, match="no such input"):
        gatecc.specialise(model, [(args, kwargs)], {"job": 1})
    assert model.blocks[1].mlp.router.weight.shape == (3, 12, 16)
