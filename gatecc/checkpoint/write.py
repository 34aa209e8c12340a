"""Write: save a transformed model, whole or only what is new, and the recipe beside what another library saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Literal, cast

import torch
from torch import nn

from gatecc.capture.compiled import behind
from gatecc.capture.shield import random_states_kept, shielded
from gatecc.capture.tree import decode, encode
from gatecc.checkpoint.examples import special_ids, synthetic
from gatecc.checkpoint.models import described
from gatecc.checkpoint.state import base_state, digests, kinds_of, plain, state_of, stored_state, ties_of
from gatecc.engine.analyse import evaluation
from gatecc.errors import ArgumentError, CheckpointError
from gatecc.ir import store
from gatecc.ir.weights import aside_state
from gatecc.scope.state import base_class
from gatecc.transform import Step, history

FORMAT = 2
RECIPE = "recipe.json"
EXAMPLES = ("synthetic", "keep")
NOTE = "Load this folder with gatecc.load: without gatecc its weights make another model, in silence."
Weights = Literal["whole", "new", "pretrained"]


@shielded
def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    only_new: bool = False,
    example_inputs: Literal["synthetic", "keep"] = "synthetic",
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a transformed model to ``folder``; an earlier checkpoint there stays whole until the new one is.

    ``only_new`` leaves out the weights of the base model, whose digests are written instead: `load` puts the rest onto
    a base model that has the same weights. ``example_inputs``: the graphs are captured again from inputs of the same
    form as those of the transform; "synthetic" draws their values anew, "keep" writes the user's own. ``state_dict``
    holds gathered tensors where the model's own are sharded.

    Raises CheckpointError if the model was not transformed, if it does not run on synthetic inputs, or if a file cannot
    be written; ArgumentError if a rewrite selects sites by a Python function, or an example input is an object that no
    file can hold.
    """
    if example_inputs not in EXAMPLES:
        raise ArgumentError("unknown example_inputs", found=repr(example_inputs), expected=" or ".join(EXAMPLES))
    model = behind(model)
    if not history(model):
        raise CheckpointError(
            "the model was not transformed: there is no recipe to save",
            found=type(model).__name__,
            do="save what gatecc.transform returned, without wrappers (model.module of DDP); "
            "for other models use torch.save",
        )
    weights: Weights = "new" if only_new else "whole"
    write(model, folder, weights, state_of(model, state_dict), keep=example_inputs == "keep", run=True)


def write(
    model: nn.Module,
    folder: str | os.PathLike[str],
    weights: Weights,
    state: dict[str, torch.Tensor],
    *,
    keep: bool = False,
    run: bool = False,
) -> None:
    """Write the recipe and the tensors that ``weights`` asks for; ``run`` tries synthetic inputs on the model first."""
    example: dict[str, torch.Tensor] = {}
    steps = [_step_to_json(step, example) for step in history(model)]
    if not keep:
        special = special_ids(model)
        example = {name: synthetic(t, special, seed) for seed, (name, t) in enumerate(example.items())}
        if run:
            _try(model, [decode(step["inputs"], example) for step in steps])
    before = base_state(model, state)
    kinds, base = kinds_of(state), kinds_of(before)
    apart = aside_state(model) if weights == "pretrained" else {}  # the other library does not write it
    new = {name: k for name, k in kinds.items() if base.get(name) != k or name in apart}  # new, or with new rows
    chosen = state if weights == "whole" else {name: state[name] for name in new}
    stored, aliases = stored_state(chosen)
    data = {
        "format": FORMAT,
        "note": NOTE,
        "gatecc": version("gatecc"),
        "torch": torch.__version__,
        "model": base_class(model).__qualname__,
        "weights": weights,
        **described(model, weights),
        "steps": steps,
        "base": base,
        "new": new,
        "gone": [name for name in base if name not in kinds],
        "digests": digests(before, [name for name in base if weights == "new"]),
        "aliases": aliases,
        "tied": ties_of(model),
    }
    tensors = {"model" if weights == "whole" else "new": stored, "example": {k: plain(t) for k, t in example.items()}}
    store.write(folder, RECIPE, data, tensors)


def sites_of(step: Step) -> list[str]:
    """The sites that a transform rewrote, in order."""
    return [row.site for row in step.report.rewrites]


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
        "sites": sites_of(step),
        "effects": [effect.to_json() for effect in step.effects],
        "missed": list(step.missed),
    }


def _try(model: nn.Module, calls: list[Any]) -> None:
    for args, kwargs in calls:
        try:
            with evaluation(model), torch.no_grad(), random_states_kept():
                model(*args, **cast("dict[str, Any]", kwargs))
        except Exception as e:
            raise CheckpointError(
                "the model does not run on example inputs with other values than yours",
                found=f"{type(e).__name__}: {e}"[:300],
                do='save(..., example_inputs="keep") writes your example inputs into the checkpoint; or transform with '
                "inputs that you would hand on",
            ) from e
