"""Checkpoint: a transformed model as its recipe (readable, replayable) and its weights.

A folder holds ``recipe.json`` (every transform step, the tensors of the base model and the new ones, the file names
with their SHA-256), ``model.safetensors`` (the whole state dict, tied weights once) and ``example.safetensors`` (the
example inputs, with which the graphs are captured again: do not transform with inputs that you would not hand on).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from gatecc.analysis import check_model
from gatecc.capture.compiled import behind
from gatecc.capture.shield import shielded
from gatecc.capture.tree import decode, encode
from gatecc.errors import CheckpointError, GateccError
from gatecc.ir import store
from gatecc.ir.rewrite import Recipe, rewrite_from_json
from gatecc.scope.scope import base_class
from gatecc.transform import Step, history, revert, rewritten

FORMAT = 2
RECIPE = "recipe.json"
SHOWN = 5  # parameters that an error names


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a transformed model to ``folder``; an earlier checkpoint there stays whole until the new one is.

    Raises CheckpointError if the model was not transformed, or a file cannot be written; ArgumentError if a rewrite
    selects sites by a Python function, or an example input is an object that no file can hold.
    """
    model = behind(model)
    steps = history(model)
    if not steps:
        raise CheckpointError(
            "the model was not transformed: there is no recipe to save",
            found=type(model).__name__,
            do="save what gatecc.transform returned, without wrappers (model.module of DDP); "
            "for other models use torch.save",
        )
    state = _state(model)
    stored, aliases = _stored(state)
    example: dict[str, torch.Tensor] = {}
    kinds = {name: _kind(t) for name, t in state.items()}
    base = _base_kinds(model, kinds)
    data = {
        "format": FORMAT,
        "gatecc": version("gatecc"),
        "torch": torch.__version__,
        "model": base_class(model).__qualname__,
        "steps": [_step_to_json(step, example) for step in steps],
        "base": base,
        "new": {name: kind for name, kind in kinds.items() if base.get(name) != kind},  # new, or with new rows
        "aliases": aliases,
        "tied": _ties(model),
    }
    store.write(folder, RECIPE, data, {"model": stored, "example": {k: _plain(t) for k, t in example.items()}})


@shielded
def load(model: nn.Module, folder: str | os.PathLike[str], *, inplace: bool = False) -> nn.Module:
    """Replay a checkpoint's recipe on a base model and load the weights: outputs are bitwise those of the saved model.

    ``model`` is of the class and configuration that the saved model was made from, in its dtype; its weights do not
    matter. It is untouched unless ``inplace``; after an error it is untouched anyway, and so is its train or eval mode.

    Raises CheckpointError: no or a damaged checkpoint, an unknown format, another base model (naming the parameters).
    """
    check_model(model)
    data = store.read_head(folder, RECIPE)
    if data.get("format") != FORMAT:
        raise CheckpointError(
            "the checkpoint has a format that this gatecc does not know",
            where=str(folder),
            found=f"format {data.get('format')!r}, written by gatecc {data.get('gatecc', 'unknown')}",
            expected=f"format {FORMAT}",
            do="install the gatecc that wrote it, or a later one",
        )
    saved = _read(folder, data, next(model.parameters(), torch.empty(0)).device)
    _check_base(model, saved)
    target = model if inplace else copy.deepcopy(model)
    try:
        for step in saved.steps:
            _replay(target, step)
        _check_tensors("the transformed model does not fit the checkpoint", _state(target), saved.kinds)
    except BaseException:
        if inplace:
            revert(target, inplace=True)
        raise
    target.load_state_dict(saved.weights)
    _tie(target, saved.ties)
    return target


# --- what is written --------------------------------------------------------------------------------------------------


def _step_to_json(step: Step, example: dict[str, torch.Tensor]) -> dict[str, Any]:
    recipe = step.recipe
    return {
        "recipe": recipe.name,
        "citation": recipe.citation,
        "summary": recipe.summary,
        "options": encode(dict(recipe.options), example, "options"),
        "rewrites": [r.to_json() for r in recipe.rewrites],
        "scope": step.scope,
        "inputs": encode(step.inputs, example, "example_inputs"),
        "sites": _sites(step),
        "effects": [effect.to_json() for effect in step.effects],
        "missed": list(step.missed),
    }


def _sites(step: Step) -> list[str]:
    return [row.site for row in step.report.rewrites]


def _base_kinds(model: nn.Module, kinds: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """What the base model holds: without the new modules, and without new rows in its own weights."""
    steps = history(model)
    ties = _ties(model)
    base = dict(kinds)
    for effect in reversed([effect for step in steps for effect in step.effects]):
        base = effect.before(base, ties)
    return base


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict. Raises CheckpointError if a module keeps something other than tensors in it."""
    state: dict[str, Any] = dict(model.state_dict())
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                "the state dict holds something that is no tensor", where=name, found=type(value).__name__
            )
    return state


def _stored(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What goes to the file, each tensor in memory of its own; and the names that are the same tensor as another."""
    stored: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        first = seen.setdefault(place, name) if tensor.numel() else name
        if first != name:
            aliases[name] = first
            continue
        plain = _plain(tensor)
        storage = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return stored, aliases


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and no view of a larger storage (which a file would have to hold as a whole)."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _ties(model: nn.Module) -> dict[str, str]:
    """Each parameter name that is the same Parameter as an earlier name, and that name."""
    first: dict[int, str] = {}
    names = [(name, first.setdefault(id(p), name)) for name, p in model.named_parameters(remove_duplicate=False)]
    return {name: other for name, other in names if name != other}


def _kind(tensor: torch.Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


# --- what is read -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _SavedStep:
    recipe: Recipe
    scope: Any
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    sites: list[str]
    effects: list[list[Any]]
    missed: list[str]


@dataclass(frozen=True, eq=False)
class _Saved:
    model: str
    steps: list[_SavedStep]
    base: dict[str, list[Any]]
    new: dict[str, list[Any]]
    ties: dict[str, str]
    weights: dict[str, torch.Tensor]

    @property
    def kinds(self) -> dict[str, list[Any]]:
        return {**self.base, **self.new}


def _read(folder: str | os.PathLike[str], data: dict[str, Any], device: torch.device) -> _Saved:
    try:
        weights = store.read_tensors(folder, data, "model")
        weights |= {name: weights[first] for name, first in data["aliases"].items()}
        example = {k: t.to(device) for k, t in store.read_tensors(folder, data, "example").items()}
        steps = [_read_step(step, example) for step in data["steps"]]
        saved = _Saved(str(data["model"]), steps, data["base"], data["new"], data["tied"], weights)
        if {name: _kind(t) for name, t in weights.items()} != saved.kinds:
            raise ValueError("the tensors are not those that the recipe lists")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        if isinstance(e, GateccError):
            raise
        raise CheckpointError("the recipe is damaged", where=str(folder), found=f"{type(e).__name__}: {e}") from e
    return saved


def _read_step(step: dict[str, Any], example: dict[str, torch.Tensor]) -> _SavedStep:
    options = decode(step["options"], example)
    try:
        rewrites = tuple(rewrite_from_json(r) for r in step["rewrites"])
    except GateccError as e:
        raise CheckpointError(
            f"the recipe {step['recipe']} cannot be rebuilt",
            found=e.what + (f" {e.found}" if e.found else ""),
            expected=e.expected,
            do="import the module that defines the rewrite before loading",
        ) from e
    recipe = Recipe(step["recipe"], step["citation"], rewrites, step["summary"], tuple(options.items()))
    inputs = decode(step["inputs"], example)
    return _SavedStep(recipe, step["scope"], inputs, step["sites"], step["effects"], step["missed"])


def _check_base(model: nn.Module, saved: _Saved) -> None:
    if history(model):
        raise CheckpointError(
            "the base model was transformed already",
            found=", ".join(step.recipe.name for step in history(model)),
            do="load into gatecc.revert(model), or a fresh model",
        )
    if type(model).__qualname__ != saved.model:
        raise CheckpointError(
            "the base model is of another class", found=type(model).__qualname__, expected=saved.model
        )
    _check_tensors("the base model does not fit the checkpoint", _state(model), saved.base)
    apart = {n: o for n, o in _ties(model).items() if saved.ties.get(n, n) != saved.ties.get(o, o)}
    if apart:
        raise CheckpointError(
            "the base model ties weights that the checkpoint holds apart",
            where=", ".join(list(apart)[:SHOWN]),
            found="; ".join(f"{n} is {o}" for n, o in list(apart.items())[:SHOWN]),
            do="make the base model with untied weights (transformers: tie_word_embeddings=False)",
        )


def _check_tensors(what: str, state: Mapping[str, torch.Tensor], kinds: Mapping[str, list[Any]]) -> None:
    found = {name: _kind(t) for name, t in state.items()}
    wrong = [name for name in {**kinds, **found} if found.get(name) != kinds.get(name)]
    if not wrong:
        return
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    raise CheckpointError(
        what,
        where=", ".join(wrong[:SHOWN]) + more,
        found="; ".join(f"{name}: {_described(found.get(name))}" for name in wrong[:SHOWN]),
        expected="; ".join(f"{name}: {_described(kinds.get(name))}" for name in wrong[:SHOWN]),
        do="make the base model from the configuration, and in the dtype, of the saved one",
    )


def _described(kind: list[Any] | None) -> str:
    return "missing" if kind is None else f"{kind[0]} {tuple(kind[1])}"


def _replay(target: nn.Module, step: _SavedStep) -> None:
    with torch.random.fork_rng(devices=[]):  # new parameters start from random values, which are overwritten
        try:
            rewritten(target, step.recipe, step.inputs, step.scope, inplace=True, verify=False, missed=step.missed)
        except GateccError as e:
            raise CheckpointError(
                f"the recipe {step.recipe.name} cannot be replayed on this base model", where=e.where, found=e.render()
            ) from e
    made = history(target)[-1]
    for name, found, expected in (
        ("sites", _sites(made), step.sites),
        ("effects on weights", [effect.to_json() for effect in made.effects], step.effects),
    ):
        if found != expected:
            raise CheckpointError(
                f"the recipe {step.recipe.name} does something else on this base model",
                where=f"{name}: " + ", ".join(str(x) for x in (*found, *expected) if (x in found) != (x in expected)),
                found=f"{len(found)} {name}",
                expected=f"{len(expected)} {name}",
                do="use the version of the model's code that the checkpoint was made with",
            )


def _tie(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Make one Parameter of those that were one in the saved model (a base model may have made them apart)."""
    for name, first in ties.items():
        holder, _, leaf = name.rpartition(".")
        model.get_submodule(holder).register_parameter(leaf, model.get_parameter(first))
