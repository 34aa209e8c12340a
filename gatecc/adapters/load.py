"""Load: adapters of peft as the experts of one bank for each matrix that they adapt."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gatecc.adapters.read import Adapter, Factors, read
from gatecc.errors import ArgumentError, CheckpointError
from gatecc.ir.router import Router
from gatecc.ir.select import Selector
from gatecc.passes.branch.low_rank import LowRanks
from gatecc.recipes.phatgoose import VECTOR
from gatecc.recipes.registry import build
from gatecc.transform import transform

Source = str | os.PathLike[str] | nn.Module | Adapter


def load(
    model: nn.Module,
    adapters: Sequence[Source],
    example_inputs: Any,
    *,
    recipe: str = "lora-mixture",
    options: Mapping[str, Any] | None = None,
    **how: Any,
) -> nn.Module:
    """A model with adapters as experts: expert i of every bank is the i-th adapter.

    ``adapters``: folders that peft wrote, PeftModels (all adapters of each), models with branches of the body ``lora``,
    or what `read` gave. ``model`` is the
    plain base. ``recipe`` weighs them, with ``options`` of its own; it takes the options sites, experts, rank and
    alpha, which are set here. ``how`` goes to `gatecc.transform`.

    Adapters may differ in rank, which is padded with zeros, and in the modules that they adapt: where one adapts
    nothing, it adds 0. Other scales than those of the rest are multiplied into B.

    Raises CheckpointError for adapters that are no plain LoRA, or of another base: modules that the model does not
    have, or of another size. Raises ArgumentError without adapters, and what `gatecc.transform` raises.
    """
    found = [one for source in adapters for one in ([source] if isinstance(source, Adapter) else read(source))]
    if not found:
        raise ArgumentError("no adapters", found="an empty list", expected="one or more")
    names = _checked(model, found)
    every = [f for one in found for f in one.factors.values()]
    rank = max(f.a.size(0) for f in every)
    scales = {f.scale for f in every}
    scale = scales.pop() if len(scales) == 1 else 1.0
    given = {"experts": len(found), "rank": rank, "alpha": scale * rank, "sites": str(Selector("linear", names))}
    before = dict(_banks(model))
    made = transform(model, build(recipe, **given, **(options or {})), example_inputs, **how)
    banks = {path.rpartition(".")[0]: bank for path, bank in _banks(made) if path not in before}
    for name in names:
        if name not in banks:
            raise ArgumentError(
                f"the recipe {recipe} makes no bank where adapters are",
                where=name,
                found=", ".join(banks) or "no banks",
                expected="a recipe whose body is loras",
            )
        _fill(banks[name], [one.factors.get(name) for one in found], scale)
        _fill_vectors(made, f"{name}.{VECTOR}", [one.vectors.get(name) for one in found])
    return made


def _banks(model: nn.Module) -> Iterable[tuple[str, LowRanks]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LowRanks))


def _checked(model: nn.Module, adapters: Iterable[Adapter]) -> tuple[str, ...]:
    """The modules that the adapters adapt, in the order of the model. Raises CheckpointError for another base."""
    modules = dict(model.named_modules())
    if wrapped := next((name for name in modules if name.endswith((".lora_A", ".base_layer"))), None):
        raise CheckpointError(
            "the base holds adapters of peft already",
            where=wrapped,
            found=type(model).__name__,
            do="pass the model of before, or what peft_model.unload() gives back",
        )
    for one in adapters:
        for name, factors in one.factors.items():
            _check_shape(one.name, name, modules.get(name), factors)
    wanted = {name for one in adapters for name in one.factors}
    return tuple(name for name in modules if name in wanted)


def _check_shape(adapter: str, name: str, module: nn.Module | None, factors: Factors) -> None:
    weight = None if module is None else module._parameters.get("weight")
    shape = (factors.b.size(0), factors.a.size(1))
    if weight is not None and sorted(weight.shape) == sorted(shape) and weight.dim() == 2:
        return
    raise CheckpointError(
        "the adapter belongs to another base",
        where=adapter,
        found=f"{name} {'is not in the model' if weight is None else f'of {tuple(weight.shape)}'}",
        expected=f"{name} with a matrix of {shape[0]} by {shape[1]}",
        do="load the base that adapter_config.json names in base_model_name_or_path",
    )


@torch.no_grad()
def _fill(bank: LowRanks, factors: Sequence[Factors | None], scale: float) -> None:
    """Write factors into a bank, the rest of which is 0: a missing expert, and the rows that a smaller rank lacks."""
    bank.a.zero_()
    bank.b.zero_()
    for number, own in enumerate(factors):
        if own is None:
            continue
        rank = own.a.size(0)
        b: Tensor = own.b if own.scale == scale else own.b * (own.scale / scale)
        bank.a[number, :rank].copy_(own.a)
        bank.b[number, :rank].copy_(b.T)


@torch.no_grad()
def _fill_vectors(model: nn.Module, path: str, vectors: Sequence[Tensor | None]) -> None:
    """Write gate vectors into a router that compares with them; 0 for an expert that adapts nothing here."""
    router = dict(model.named_modules()).get(path)
    if not isinstance(router, Router) or not any(v is not None for v in vectors):
        return
    rows = router.get_parameter("weight")
    for number, vector in enumerate(vectors):
        rows[number].zero_() if vector is None else rows[number].copy_(vector)
