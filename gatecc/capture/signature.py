"""Signature of a call: everything about its arguments that a captured graph bakes in, and the tensors that it does not.

torch.export does not guard None against a tensor, nor the value of a Python constant against another: the key made here
does. Two calls with equal keys may differ in the sizes of tensor dimensions only, and of those never between 0, 1 and
more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch.utils import _pytree as pytree

from gatecc.capture.neutral import neutral
from gatecc.errors import ExampleInputsError

Key = tuple[Any, ...]
CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, torch.layout)
TOKENS = (
    "decoder_input_ids",
    "input_ids",
    "ids",
    "tokens",
    "idx",
)  # names of the token input, the surest first


class OpaqueArgumentError(Exception):
    """An argument is of a type that a graph can neither take nor bake in (a KV cache object, a file, ...).

    ``do`` is what the user can do about it, where that is special.
    """

    def __init__(self, found: str, *, do: str = "") -> None:
        super().__init__(found)
        self.do = do


class NestedTensorError(OpaqueArgumentError):
    """An argument is a nested tensor, which torch's fused encoder layers alone can take."""


def flatten(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Key, list[torch.Tensor]]:
    """The key of a call and its tensor leaves in order. Raises OpaqueArgumentError. Written so that Dynamo can trace
    it."""
    leaves: list[torch.Tensor] = []
    positional = tuple([_walk(x, leaves) for x in args])
    keyword = tuple([(name, _walk(x, leaves)) for name, x in kwargs.items()])
    return (positional, keyword), leaves


def autocast(leaves: Sequence[torch.Tensor]) -> tuple[str, torch.dtype] | None:
    """Device and dtype of the autocast that these tensors are under, None without: a graph bakes in dtypes that it
    chose."""
    if not leaves or not torch._C._is_any_autocast_enabled():
        return None
    device = leaves[0].device.type
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def _walk(x: Any, leaves: list[torch.Tensor]) -> Any:
    if isinstance(x, torch.Tensor):
        if x.is_nested:
            raise NestedTensorError("a nested tensor")
        leaves.append(x)
        return ("tensor", x.dtype, x.device, _small_sizes(x))
    if x is None:
        return None
    if isinstance(x, CONSTANTS):
        return (type(x).__name__, x)  # the type too, since 1 == 1.0 == True
    if type(x) is tuple or type(x) is list:
        return (type(x).__name__, *[_walk(v, leaves) for v in x])
    if type(x) is dict:
        return ("dict", *[(k, _walk(v, leaves)) for k, v in x.items()])
    node = _registered(x)
    children, context = node.flatten_fn(x)
    return ("node", type(x), repr(context), *[_walk(v, leaves) for v in children])


def _small_sizes(x: torch.Tensor) -> tuple[int, ...]:
    """Rank and small sizes: -1 stands for any size of 2 or more. A symbolic size is 2 or more by construction."""
    return tuple([s if type(s) is int and s < 2 else -1 for s in x.shape])


def _registered(x: Any) -> pytree.NodeDef:
    """The pytree definition of a container type. Caches are never taken: their update would be lost in a graph."""
    node = pytree.SUPPORTED_NODES.get(type(x))
    if node is None or is_cache(x):
        raise OpaqueArgumentError(f"an argument of type {type(x).__module__}.{type(x).__qualname__}")
    return node


def is_cache(x: Any) -> bool:
    """Whether x is a KV cache of transformers (recognised by name, so that transformers need not be installed)."""
    return any(c.__name__ == "Cache" and c.__module__.startswith("transformers.") for c in type(x).__mro__)


def rebuild(template: Any, leaves: Iterator[torch.Tensor]) -> Any:
    """The same structure with its tensors replaced, in the order of flatten."""
    if isinstance(template, torch.Tensor):
        return next(leaves)
    if template is None or isinstance(template, CONSTANTS):
        return template
    if type(template) is tuple or type(template) is list:
        return type(cast("list[Any]", template))(rebuild(v, leaves) for v in template)
    if type(template) is dict:
        return {k: rebuild(v, leaves) for k, v in template.items()}
    node = _registered(template)
    children, context = node.flatten_fn(template)
    return node.unflatten_fn([rebuild(v, leaves) for v in children], context)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a structure that flatten accepts."""
    leaves: list[torch.Tensor] = []
    _walk(tree, leaves)
    return rebuild(tree, iter([function(x) for x in leaves]))


def copied(call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with copies of its tensors, which a model may change in place; one that is passed twice is one copy.

    Calls that hold other things than tensors and constants come back as they are.
    """
    made: dict[int, torch.Tensor] = {}

    def copy(x: torch.Tensor) -> torch.Tensor:
        if id(x) not in made:
            made[id(x)] = x.detach().clone().requires_grad_(x.requires_grad)
        return made[id(x)]

    try:
        return map_tensors(copy, call)
    except OpaqueArgumentError:
        return call


def leaf_paths(args: tuple[Any, ...], kwargs: Mapping[str, Any], parameters: list[str]) -> list[tuple[Any, ...]]:
    """Where each tensor leaf stands in a call: parameter name first, e.g. ``("position_embeddings", 0)``."""
    paths: list[tuple[Any, ...]] = []
    for i, x in enumerate(args):
        _paths(x, (parameters[i] if i < len(parameters) else f"arg{i}",), paths)
    for k, x in kwargs.items():
        _paths(x, (k,), paths)
    return paths


def _paths(x: Any, path: tuple[Any, ...], paths: list[tuple[Any, ...]]) -> None:
    if isinstance(x, torch.Tensor):
        paths.append(path)
        return
    if x is None or isinstance(x, CONSTANTS):
        return
    if type(x) is dict:
        children = list(x.items())
    elif type(x) is tuple or type(x) is list:
        children = list(enumerate(x))
    else:
        children = list(enumerate(_registered(x).flatten_fn(x)[0]))
    for k, v in children:
        _paths(v, (*path, k), paths)


def split_inputs(example_inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as (args, kwargs), with `neutral` tensors. Raises ExampleInputsError for any other form."""
    if isinstance(example_inputs, Mapping):
        return neutral_inputs((), dict(example_inputs))
    if isinstance(example_inputs, tuple):
        if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], Mapping):
            return neutral_inputs(example_inputs[0], dict(example_inputs[1]))
        return neutral_inputs(example_inputs, {})
    raise ExampleInputsError(
        "example_inputs has an unknown form",
        found=type(example_inputs).__name__,
        expected="a tuple (positional), a dict (keyword arguments) or (tuple, dict)",
        do="put a single tensor in a tuple: (x,)",
    )


def neutral_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with `neutral` tensors; the same objects if all are, or one holds no tensors that are
    known."""
    changed: list[torch.Tensor] = []

    def each(x: torch.Tensor) -> torch.Tensor:
        plain = neutral(x)
        changed.extend([] if plain is x else [x])
        return plain

    try:
        made = map_tensors(each, (args, kwargs))
    except OpaqueArgumentError:
        return args, kwargs
    return made if changed else (args, kwargs)
