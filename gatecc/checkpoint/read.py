"""Read: load a checkpoint, onto a base model or onto one that its library makes."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import nn

from gatecc.capture.shield import random_states_kept, shielded
from gatecc.capture.tree import decode
from gatecc.checkpoint import models
from gatecc.checkpoint.state import digests, kinds_of, load_state, state_of, tie, ties_of
from gatecc.checkpoint.write import FORMAT, RECIPE, sites_of
from gatecc.engine.analyse import check_model
from gatecc.errors import ArgumentError, CheckpointError, GateccError
from gatecc.ir import store
from gatecc.ir.rewrite import Recipe, rewrite_from_json
from gatecc.ir.weights import Effect, effect_from_json
from gatecc.scope.state import base_class
from gatecc.transform import history, revert, rewritten

SHOWN = 5  # parameters that an error names


@overload
def load(model: nn.Module, folder: str | os.PathLike[str], *, inplace: bool = False) -> nn.Module: ...
@overload
def load(model: str | os.PathLike[str]) -> nn.Module: ...
@shielded
def load(
    model: nn.Module | str | os.PathLike[str], folder: str | os.PathLike[str] | None = None, *, inplace: bool = False
) -> nn.Module:
    """Replay a checkpoint's recipe on a base model and load the weights: outputs are bitwise those of the saved model.

    ``model`` is of the class and configuration that the saved model was made from, in its dtype; its weights do not
    matter, unless the checkpoint holds only what is new. It is untouched unless ``inplace``; after an error it is
    untouched anyway, and so is its train or eval mode. ``load(folder)`` lets transformers or diffusers make the model,
    from the configuration in a folder of `save` or the folder of a ``save_pretrained``; it is in eval mode.

    Raises CheckpointError: no or a damaged checkpoint, an unknown format, another base model (naming the parameters).
    """
    if folder is None:
        if isinstance(model, nn.Module):
            raise ArgumentError("the folder is missing", expected="gatecc.load(model, folder), or gatecc.load(folder)")
        folder, data = model, _head(model)
        if data.get("weights") == "new":
            raise CheckpointError(
                "the checkpoint holds only what is new",
                where=str(folder),
                do="make the base model and pass it: gatecc.load(model, folder)",
            )
        make = models.from_folder if data.get("weights") == "pretrained" else models.from_config
        return _load(make(data, folder), folder, data, inplace=True, made=True)
    data = _head(folder)
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            "this is no model",
            found=type(model).__name__,
            expected="gatecc.load(model, folder), or gatecc.load(folder)",
        )
    return _load(model, folder, data, inplace=inplace)


def _load(
    model: nn.Module, folder: str | os.PathLike[str], data: dict[str, Any], *, inplace: bool, made: bool = False
) -> nn.Module:
    """``made``: the model has the folder's own weights already."""
    check_model(model)
    saved = _read(folder, data, next(model.parameters(), torch.empty(0)).device)
    _check_base(model, saved)
    weights = dict(saved.weights)
    if saved.holds == "pretrained":
        base = state_of(model) if made else models.weights_in(model, data, folder)
        weights = {**{name: t.clone() for name, t in base.items() if name in saved.forms}, **weights}
    target = model if inplace else copy.deepcopy(model)
    try:
        for step in saved.steps:
            _replay(target, step)
        state = state_of(target)
        _check_tensors("the transformed model does not fit the checkpoint", state, saved.forms)
        if saved.holds == "new":
            weights = {**state, **weights}
        _check_tensors("the folder does not hold the weights of the model", weights, saved.forms)
    except BaseException:
        if inplace:
            revert(target, inplace=True)
        raise
    load_state(target, weights)
    tie(target, saved.ties)
    return target


def _head(folder: str | os.PathLike[str]) -> dict[str, Any]:
    data = store.read_head(folder, RECIPE)
    if data.get("format") != FORMAT:
        raise CheckpointError(
            "the checkpoint has a format that this gatecc does not know",
            where=str(folder),
            found=f"format {data.get('format')!r}, written by gatecc {data.get('gatecc', 'unknown')}",
            expected=f"format {FORMAT}",
            do="install the gatecc that wrote it, or a later one",
        )
    return data


@dataclass(frozen=True, eq=False)
class _SavedStep:
    recipe: Recipe
    scope: Any
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    sites: list[str]
    effects: list[Effect]
    missed: list[str]


@dataclass(frozen=True, eq=False)
class _Saved:
    model: str
    steps: list[_SavedStep]
    base: dict[str, list[Any]]
    new: dict[str, list[Any]]
    gone: list[str]  # of the base model: weights that became others
    ties: dict[str, str]
    digests: dict[str, str]
    holds: str  # "whole", "new", or "pretrained": the rest is in files of another library
    weights: dict[str, torch.Tensor]

    @property
    def forms(self) -> dict[str, list[Any]]:
        return {name: kind for name, kind in {**self.base, **self.new}.items() if name not in self.gone}


def _read(folder: str | os.PathLike[str], data: dict[str, Any], device: torch.device) -> _Saved:
    try:
        holds = str(data["weights"])
        weights = store.read_tensors(folder, data, "model" if holds == "whole" else "new")
        weights |= {name: weights[first] for name, first in data["aliases"].items()}
        example = {k: t.to(device) for k, t in store.read_tensors(folder, data, "example").items()}
        steps = [_read_step(step, example) for step in data["steps"]]
        base = (data["base"], data["new"], data.get("gone", []))
        head = (str(data["model"]), steps, *base, data["tied"], data["digests"])
        saved = _Saved(*head, holds, weights)
        if kinds_of(weights) != (saved.forms if holds == "whole" else saved.new):
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
    effects = [effect_from_json(effect) for effect in step["effects"]]
    return _SavedStep(recipe, step["scope"], inputs, step["sites"], effects, step["missed"])


def _check_base(model: nn.Module, saved: _Saved) -> None:
    if history(model):
        raise CheckpointError(
            "the base model was transformed already",
            found=", ".join(step.recipe.name for step in history(model)),
            do="load into gatecc.revert(model), or a fresh model",
        )
    if base_class(model).__qualname__ != saved.model:
        raise CheckpointError(
            "the base model is of another class", found=type(model).__qualname__, expected=saved.model
        )
    state = state_of(model)
    _check_tensors("the base model does not fit the checkpoint", state, saved.base)
    _check_weights(state, saved.digests)
    apart = {n: o for n, o in ties_of(model).items() if saved.ties.get(n, n) != saved.ties.get(o, o)}
    if apart:
        raise CheckpointError(
            "the base model ties weights that the checkpoint holds apart",
            where=", ".join(list(apart)[:SHOWN]),
            found="; ".join(f"{n} is {o}" for n, o in list(apart.items())[:SHOWN]),
            do="make the base model with untied weights (transformers: tie_word_embeddings=False)",
        )


def _check_tensors(what: str, state: Mapping[str, torch.Tensor], kinds: Mapping[str, list[Any]]) -> None:
    found = kinds_of(state)
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


def _check_weights(state: Mapping[str, torch.Tensor], expected: Mapping[str, str]) -> None:
    """What is new alone belongs to the base weights that it was trained with."""
    found = digests(state, expected)
    wrong = [name for name in expected if found[name] != expected[name]]
    if wrong:
        raise CheckpointError(
            "the base model has other weights than the one that was saved, of which only what is new was written",
            where=", ".join(wrong[:SHOWN]) + (f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""),
            found=f"{len(wrong)} of {len(expected)} weights differ",
            do="load the weights of the base model first; if they were trained too, save without only_new",
        )


def _described(kind: list[Any] | None) -> str:
    return "missing" if kind is None else f"{kind[0]} {tuple(kind[1])}"


def _replay(target: nn.Module, step: _SavedStep) -> None:
    with random_states_kept():  # new parameters start from random values, which are overwritten
        try:
            rewritten(target, step.recipe, step.inputs, step.scope, inplace=True, verify=False, missed=step.missed)
        except GateccError as e:
            raise CheckpointError(
                f"the recipe {step.recipe.name} cannot be replayed on this base model", where=e.where, found=e.render()
            ) from e
    made = history(target)[-1]
    for name, found, expected in (
        ("sites", sites_of(made), step.sites),
        ("effects on weights", *([e.describe() for e in effects] for effects in (made.effects, step.effects))),
    ):
        if found != expected:
            raise CheckpointError(
                f"the recipe {step.recipe.name} does something else on this base model",
                where=f"{name}: " + ", ".join(str(x) for x in (*found, *expected) if (x in found) != (x in expected)),
                found=f"{len(found)} {name}",
                expected=f"{len(expected)} {name}",
                do="use the version of the model's code that the checkpoint was made with",
            )
