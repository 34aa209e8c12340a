"""State: the tensors of a model as a checkpoint holds them: dtypes and shapes, ties, digests, memory of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from gatecc.errors import CheckpointError
from gatecc.ir.weights import aside_state, is_wrapped, load_aside
from gatecc.transform import history

Kind = list[Any]  # dtype and shape, as JSON gives them back


def state_of(model: nn.Module, given: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The state dict and what transforms took out of the model, with ``given`` tensors in place of the model's own.

    Raises CheckpointError if a module keeps something other than tensors in it, or if they are sharded.
    """
    state: dict[str, Any] = {**model.state_dict(), **aside_state(model)}
    for name, value in state.items():
        if given is not None and name in given:
            state[name] = value = given[name]
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                "the state dict holds something that is no tensor", where=name, found=type(value).__name__
            )
        if value.is_meta:
            raise CheckpointError(
                "a weight holds nothing",
                where=name,
                found="device meta",
                do="gatecc.materialise(model, weights) before; a model whose rewritten weights were loaded at once has "
                "none of those that the rewrite took out: save its state dict, or torch.distributed.checkpoint",
            )
        if hasattr(value, "full_tensor"):
            raise CheckpointError(
                "the weights are sharded over processes",
                where=name,
                found=type(value).__name__,
                do="gather them on every rank, and save on one: state = torch.distributed.checkpoint.state_dict."
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), then "
                "gatecc.save(model, folder, state_dict=state)",
            )
    return state


def load_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """The inverse of `state_of`."""
    model.load_state_dict(load_aside(model, state))


def base_state(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state dict without what transforms did: no new modules, no new rows, no factors, no parts."""
    ties = ties_of(model)
    for effect in reversed([effect for step in history(model) for effect in step.effects]):
        state = effect.before(state, ties)
    return state


def stored_state(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What goes to the file, each tensor in memory of its own; and the names that are the same tensor as another.

    Raises CheckpointError for tensors of a class that wraps others.
    """
    for name, tensor in state.items():
        if is_wrapped(tensor):
            raise CheckpointError(
                "a file holds no tensors of this class",
                where=name,
                found=type(tensor.data).__name__,
                do="gatecc.save(model, folder, only_new=True) leaves the weights of the base model out, and load takes "
                "the base model that is quantised in the same way; or save before quantising",
            )
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
        own = plain(tensor)
        storage = own.untyped_storage().data_ptr()
        stored[name] = own.clone() if storage in storages else own
        storages.add(storage)
    return stored, aliases


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and no view of a larger storage (which a file would have to hold as a whole)."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def ties_of(model: nn.Module) -> dict[str, str]:
    """Each parameter name that is the same Parameter as an earlier name, and that name."""
    first: dict[int, str] = {}
    names = [(name, first.setdefault(id(p), name)) for name, p in model.named_parameters(remove_duplicate=False)]
    return {name: other for name, other in names if name != other}


def tie(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Make one Parameter of those that were one in the saved model (a base model may have made them apart)."""
    for name, first in ties.items():
        holder, _, leaf = name.rpartition(".")
        model.get_submodule(holder).register_parameter(leaf, model.get_parameter(first))


def kinds_of(state: Mapping[str, torch.Tensor]) -> dict[str, Kind]:
    """Dtype and shape of each tensor."""
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in state.items()}


def digests(state: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, str]:
    """What tells whether two tensors have the same bits."""
    return {name: _digest(state[name]) for name in names}


def _digest(tensor: torch.Tensor) -> str:
    if is_wrapped(tensor):
        inner = cast("Any", tensor.data)
        parts = [_digest(getattr(inner, name)) for name in inner.__tensor_flatten__()[0]]
        return hashlib.sha256(" ".join([type(inner).__name__, *parts]).encode()).hexdigest()[:16]
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(cast("Any", data.numpy())).hexdigest()[:16]
