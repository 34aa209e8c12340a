"""Outputs: the tensors of whatever a model returns, with their places, and what is returned beside them.

pytree knows a class of outputs only if its library has registered it, and names its entries only if it says how;
libraries differ in both. Here any mapping, named tuple, dataclass, sequence or registered class is opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree


class Leaf(NamedTuple):
    """One end of an output: its keys, names and positions from the outside in, and what is there."""

    path: tuple[str, ...]
    value: Any


def output_leaves(output: Any, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Every end of an output in order; None is no end."""
    if output is None:
        return
    children = _children(output)
    if children is None:
        yield Leaf(path, output)
        return
    for name, value in children:
        yield from output_leaves(value, (*path, str(name)))


def output_tensors(output: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of an output in order."""
    return tuple(leaf.value for leaf in output_leaves(output) if isinstance(leaf.value, torch.Tensor))


def _children(x: Any) -> list[tuple[Any, Any]] | None:
    """The parts of a container by name; None for anything else."""
    if isinstance(x, torch.Tensor | str | bytes):
        return None
    if isinstance(x, Mapping):
        return list(x.items())
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return list(zip(x._fields, x, strict=True))  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(x, list | tuple):
        return list(enumerate(x))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return [(f.name, getattr(x, f.name)) for f in dataclasses.fields(x)]
    node = pytree.SUPPORTED_NODES.get(type(x))
    return None if node is None else list(enumerate(node.flatten_fn(x)[0]))
