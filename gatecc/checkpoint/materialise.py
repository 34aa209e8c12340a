"""Materialise: weights for a model that was transformed on the meta device, shard by shard, and what waited for them.

A transform of a model without weights decides everything but numbers. When the model's own weights come, the transform
is done again on them: new modules are filled from them, and contracts are checked. A shard is let go of when its
tensors are in the model, so the peak is the model, what is new, and one shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils import _pytree as pytree

from gatecc.capture.shield import shielded
from gatecc.capture.signature import split_inputs
from gatecc.checkpoint.models import INDEX
from gatecc.checkpoint.state import tie, ties_of
from gatecc.engine.analyse import Inputs
from gatecc.engine.put_off import moved, on_meta
from gatecc.errors import ArgumentError, CheckpointError
from gatecc.transform import history, revert, rewritten

Shard = Mapping[str, torch.Tensor] | str | os.PathLike[str]
SHOWN = 5  # names that an error lists


@shielded
def materialise(
    model: nn.Module,
    weights: Shard | Iterable[Shard],
    example_inputs: Inputs | None = None,
    *,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> nn.Module:
    """Give a model that was transformed on the meta device its weights, in place, and finish what waited for them.

    Args:
        model: what `transform` returned for a model on the meta device.
        weights: of the model before the transform: a state dict, a safetensors file, a folder of them with an index,
            or several of these, of which one at a time is held in memory. Buffers that no state dict holds and that are
            on the meta device, such as tables of positions, must be among them.
        example_inputs: by default those of the transform, which must hold values then.
        device: where the weights go.
        verify: check contracts, as `transform` does.

    Weights take the dtypes that the model has. Returns the model; `last_report` tells what was checked. Afterwards it
    is as if it had been transformed with its weights. Raises what `transform` raises, ArgumentError for a model that
    has weights or was not transformed, CheckpointError for weights that do not fit: the model then has no rewrites.
    """
    steps = history(model)
    if not steps or not on_meta(model):
        raise ArgumentError(
            "there is nothing to materialise",
            found=f"{type(model).__name__}, {'with weights' if steps else 'which was not transformed'}",
            expected="what gatecc.transform returned for a model on the meta device",
        )
    calls = [step.inputs if example_inputs is None else split_inputs(example_inputs) for step in steps]
    if any(x.is_meta for call in calls for x in _tensors(call)):
        raise ArgumentError(
            "the example inputs of the transform have no values",
            found="device meta",
            do="gatecc.materialise(model, weights, example_inputs)",
        )
    revert(model, inplace=True)
    ties = ties_of(model)
    unknown: list[str] = []
    for shard in _shards(weights):
        unknown += _load(model, shard, torch.device(device))
    tie(model, {name: first for name, first in ties.items() if not model.get_parameter(first).is_meta})
    for name, first in ties.items():  # a file may hold a tied weight under any of its names
        if not model.get_parameter(name).is_meta and model.get_parameter(first).is_meta:
            tie(model, {first: name})
    _check(model, unknown)
    for step, call in zip(steps, calls, strict=True):
        rewritten(model, step.recipe, moved(call, device), step.scope, inplace=True, verify=verify, missed=step.missed)
    return model


def _tensors(call: Any) -> Iterator[torch.Tensor]:
    yield from (x for x in pytree.tree_leaves(call) if isinstance(x, torch.Tensor))


def _shards(weights: Any) -> Iterator[Mapping[str, torch.Tensor]]:
    """The state dicts, each read when it is asked for."""
    if isinstance(weights, Mapping):
        yield cast("Mapping[str, torch.Tensor]", weights)
    elif isinstance(weights, str | os.PathLike):
        for file in _files(Path(cast("Any", weights))):
            yield load_file(file)
    else:
        for one in weights:
            yield from _shards(one)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / INDEX).exists():
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        return [path / Path(name).name for name in sorted(set(index["weight_map"].values()))]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise CheckpointError("there are no weights", where=str(path), expected=f"*.safetensors, or {INDEX}")
    return found


def _load(model: nn.Module, shard: Mapping[str, torch.Tensor], device: torch.device) -> list[str]:
    """Put the tensors of a shard into the model. Returns the names that it does not have."""
    unknown: list[str] = []
    for name, tensor in shard.items():
        holder, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(holder)
        except AttributeError:
            unknown.append(name)
            continue
        old = module._parameters.get(leaf) if leaf in module._parameters else module._buffers.get(leaf)
        if old is None:
            unknown.append(name)
            continue
        if old.shape != tensor.shape:
            raise CheckpointError(
                "a weight has another shape than the model's",
                where=name,
                found=str(tuple(tensor.shape)),
                expected=str(tuple(old.shape)),
            )
        new = tensor.to(device=device, dtype=old.dtype)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            module._buffers[leaf] = new
    return unknown


def _check(model: nn.Module, unknown: list[str]) -> None:
    missing = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if not missing and not unknown:
        return
    where = (missing or unknown)[:SHOWN]
    kept = [n for n in missing if n not in model.state_dict()]
    raise CheckpointError(
        "the weights do not fit the model",
        where=", ".join(where) + (", ..." if len(missing or unknown) > SHOWN else ""),
        found=f"{len(missing)} of the model's are missing, {len(unknown)} are of no part of it",
        expected="the state dict of the model before the transform",
        do="no state dict holds "
        + ", ".join(kept[:SHOWN])
        + ": make the model with accelerate.init_empty_weights(), which leaves buffers their values, or add them"
        if kept
        else "load the checkpoint of this very configuration",
    )
