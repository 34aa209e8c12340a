"""The checks that every recipe passes (docs/checks.md), on a transformed model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gatecc
from gatecc.engine.contracts import compare
from tests.zoo.models import find
from tests.zoo.spec import Case


@cache
def case(name: str) -> Case:
    """A model of the zoo that no test changes; caches of keys and values are off."""
    made = find(name).build()
    for module in made.model.modules():  # a decoder inside may have a configuration of its own
        config: Any = module.__dict__.get("config")
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return made


def new_parameters(model: nn.Module, plain: nn.Module) -> dict[str, nn.Parameter]:
    """What a transform added."""
    known = dict(plain.named_parameters())
    return {name: p for name, p in model.named_parameters() if name not in known}


@torch.no_grad()
def randomise(parameters: Iterable[Tensor], std: float = 1.0) -> None:
    """Give gates values that matter, the same each time."""
    generator = torch.Generator().manual_seed(1)
    for p in parameters:
        p.copy_(torch.randn(p.shape, generator=generator) * std)


def zoo(
    name: str, recipe: str, *, grow: bool = True, export: bool = False, tolerance: float = 1e-6, **options: Any
) -> nn.Module:
    """Transform a model of the zoo; identity, gradient, reversible (and export) hold. Returns it with random gates."""
    known = case(name)
    model = gatecc.transform(known.model, gatecc.recipe(recipe, **options), known.inputs)
    sizes = [known.inputs, *known.dynamic] if grow else [known.inputs]
    for inputs in sizes:
        assert compare(known.model(*inputs.args, **inputs.kwargs), model(*inputs.args, **inputs.kwargs)) <= tolerance
    new = new_parameters(model, known.model)
    randomise(new.values())
    before, after = (m(*known.args, **known.kwargs) for m in (known.model, model))
    if new:
        assert compare(before, after) > 1e-3, "random gates change nothing"
    gradients(model, new, after)
    if export:
        exported(model, known)
    reverted(model, known.model, known.inputs.args, known.inputs.kwargs)
    return model


def gradients(model: nn.Module, new: dict[str, nn.Parameter], output: Any) -> None:
    """gradient: every trained new parameter has a finite gradient that is not zero, frozen ones have none."""
    model.zero_grad()
    floats = [
        x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad
    ]
    torch.stack([(x * torch.linspace(-1, 1, x.size(-1))).square().mean() for x in floats]).sum().backward()
    for name, p in new.items():
        if not p.requires_grad:
            assert p.grad is None, name
            continue
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name
        assert float(p.grad.abs().sum()) > 0, name
    model.zero_grad()


def exported(model: nn.Module, known: Case) -> None:
    """export: torch.export sees the gates, and the exported program computes the same."""
    with torch.no_grad():
        program = torch.export.export(model, tuple(known.args), dict(known.kwargs), strict=False)
        got = program.module()(*known.args, **known.kwargs)
        assert compare(model(*known.args, **known.kwargs), got) <= 1e-4


def reverted(model: nn.Module, plain: nn.Module, args: Any, kwargs: Any = None) -> None:
    """reversible: removal restores the state dict and the outputs bitwise."""
    back = gatecc.revert(model)
    state, original = back.state_dict(), plain.state_dict()
    assert state.keys() == original.keys()
    assert all(torch.equal(state[name], original[name]) for name in original)
    assert compare(plain(*args, **(kwargs or {})), back(*args, **(kwargs or {}))) == 0


@torch.no_grad()
def causal(model: nn.Module, x: Tensor, at: int) -> bool:
    """causality: whether outputs before position ``at`` stay when inputs from there on change."""
    other = copy.copy(x)
    other = torch.cat([x[:, :at], torch.flip(x[:, at:], [-1])], 1)
    return bool(torch.allclose(model(x)[:, :at], model(other)[:, :at], atol=1e-6))


def cost(model: nn.Module) -> int:
    """cost: the FLOPs that a transform added, as its report counts them."""
    totals = gatecc.last_report(model).totals
    assert totals.flops_before is not None
    assert totals.flops_after is not None
    return totals.flops_after - totals.flops_before


def agree(model: nn.Module, reference: nn.Module, *args: Tensor) -> float:
    """The largest relative difference between a model and its reference."""
    with torch.no_grad():
        return compare(reference(*args), model(*args))
