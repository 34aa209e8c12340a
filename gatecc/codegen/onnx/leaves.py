"""Leaves: a model's call as a function from named tensors to named tensors, which is what an ONNX graph is.

Inputs are the tensor leaves of ``(args, kwargs)``, named after the forward's parameters; constants and None are closed
over. Outputs are the tensor leaves of what the model returns, named after its keys or positions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gatecc.capture import signature
from gatecc.capture.outputs import Leaf, output_leaves, output_tensors
from gatecc.errors import ExampleInputsError


class Flat(nn.Module):
    """The model as ``flat(*tensors) -> tuple of tensors``."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.m = model
        self.training = model.training
        self._template = (args, kwargs)

    def arguments(self, leaves: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments with these tensors in them."""
        return signature.rebuild(self._template, iter(leaves))

    def tensors(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """The tensors of what the model returns for its own arguments."""
        return output_tensors(self.m(*args, **kwargs))

    def forward(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self.arguments(leaves)
        return self.tensors(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a model in flat form. ``inputs[i]`` is the name of ``leaves[i]``, ``outputs[i]`` of
    ``results[i]``."""

    flat: Flat
    leaves: tuple[torch.Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    results: tuple[torch.Tensor, ...]
    left_out: tuple[str, ...] = ()  # what the model returns beside tensors

    def arguments(self, leaves: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the model with ``leaves`` as its tensors."""
        return self.flat.arguments(leaves)


def _whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor of its own: torch.export makes conditions on what a view is a view of, which no graph is given."""
    return x if x._base is None else x.clone()


def flat_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The flat form of ``model(*args, **kwargs)``, which is run once. Raises ExampleInputsError."""
    try:
        args, kwargs = signature.map_tensors(_whole, (args, kwargs))
        _, leaves = signature.flatten(args, kwargs)
    except signature.OpaqueArgumentError as e:
        raise ExampleInputsError(
            "an ONNX graph takes tensors alone", found=str(e), do="leave that argument out of the example inputs"
        ) from e
    inputs = _input_names(model, args, kwargs)
    result = _run(model, args, kwargs)
    ends = list(output_leaves(result))
    held = [leaf for leaf in ends if isinstance(leaf.value, torch.Tensor)]
    outputs = _output_names([leaf.path for leaf in held], inputs)
    if not outputs or not leaves:
        raise ExampleInputsError(
            "an ONNX graph needs tensors on both sides",
            found=f"{len(leaves)} inputs, {len(outputs)} outputs" + (f": {_named(ends)}" if ends and not held else ""),
            do="return tensors, or a tuple, list, dict or dataclass of them",
        )
    beside = tuple(_named([leaf]) for leaf in ends if not isinstance(leaf.value, torch.Tensor))
    return Call(Flat(model, args, kwargs), tuple(leaves), inputs, outputs, tuple(x.value for x in held), beside)


def _named(ends: Sequence[Leaf]) -> str:
    return ", ".join(f"{'.'.join(leaf.path) or 'output'} ({type(leaf.value).__name__})" for leaf in ends)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return model(*args, **kwargs)
    except Exception as e:
        raise ExampleInputsError(
            "the model does not run on the example inputs",
            where=type(model).__name__,
            found=f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}",
            do="call the model with them once by hand; a tuple is positional, a dict is keyword arguments",
        ) from e


def _input_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    parameters = _parameter_names(model, len(args))
    return _unique(["_".join(map(str, path)) for path in signature.leaf_paths(args, kwargs, parameters)], ())


def _parameter_names(model: nn.Module, positional: int) -> list[str]:
    """The names of the positional parameters; those of ``*args`` are numbered."""
    names: list[str] = []
    for p in inspect.signature(model.forward).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            names += [f"{p.name}_{i}" for i in range(positional - len(names))]
        elif p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            names.append(p.name)
    return names


def _output_names(paths: Sequence[tuple[str, ...]], inputs: Sequence[str]) -> tuple[str, ...]:
    keyed = [bool(path) and not path[0].isdigit() for path in paths]
    return _unique(["_".join(p if k else ("output", *p)) for p, k in zip(paths, keyed, strict=True)], inputs)


def _unique(names: Sequence[str], taken: Sequence[str]) -> tuple[str, ...]:
    """Identifiers; a name that is taken gets a suffix."""
    result: list[str] = []
    for name in names:
        plain = re.sub(r"\W", "_", name)
        candidate = plain if plain not in taken else f"{plain}_out"
        while candidate in result or candidate in taken:
            candidate += "_"
        result.append(candidate)
    return tuple(result)
