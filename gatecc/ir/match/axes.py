"""Following an axis through operators that move elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gatecc.ir.ops import RESHAPES, SAME_SHAPE, TRANSPOSES, argument, opname
from gatecc.ir.sizes import Size, node_shape, numel, same

_SAME_INDEX = SAME_SHAPE | frozenset("slice narrow cat pad constant_pad_nd gather split chunk split_with_sizes".split())
_SCRAMBLING = frozenset("index unfold take put".split())


def tensor_source(node: fx.Node) -> fx.Node | None:
    """The tensor that the node's first argument holds; a piece of a split counts as made from the split tensor."""
    if opname(node) == "getitem":
        parent = node.args[0]
        return tensor_source(parent) if isinstance(parent, fx.Node) and node_shape(parent) is None else None
    first = node.args[0] if node.args else None
    if isinstance(first, list | tuple):
        first = first[0] if first else None
    return first if isinstance(first, fx.Node) else None


def permutation(node: fx.Node, rank: int) -> list[int] | None:
    """``p`` with output axis i = input axis p[i], for the operators of TRANSPOSES."""
    name, order = opname(node), list(range(rank))
    if name in ("t", "numpy_T"):
        return order[::-1]
    if name in ("mT", "adjoint"):
        return [*order[:-2], rank - 1, rank - 2]
    if name == "permute":
        return [int(d) % rank for d in argument(node, 1, "dims")]
    if name in ("transpose", "swapaxes", "swapdims"):
        a, b = int(argument(node, 1, "dim0")) % rank, int(argument(node, 2, "dim1")) % rank
        order[a], order[b] = b, a
        return order
    if name in ("movedim", "moveaxis"):
        return _movedim(node, rank)
    return None


def _movedim(node: fx.Node, rank: int) -> list[int]:
    axes = torch.empty(list(range(rank)), device="meta")  # axis i has size i
    return list(axes.movedim(argument(node, 1, "source"), argument(node, 2, "destination")).shape)


def axis_map(node: fx.Node, source: fx.Node) -> list[int | None] | None:
    """For every axis of the node's output, the axis of ``source`` that it runs along; None where there is none."""
    out, into = node_shape(node), node_shape(source)
    if out is None or into is None:
        return None
    name = opname(node)
    if name == "getitem" and isinstance(node.args[0], fx.Node):
        name = opname(node.args[0])
        if name == "unbind":
            return _without(len(into), argument(node.args[0], 1, "dim", 0))
    if name in TRANSPOSES:
        order = permutation(node, len(into))
        return list(order) if order is not None else None
    if name in RESHAPES:
        return _reshape(out, into)
    if name == "unsqueeze":
        at = int(argument(node, 1, "dim")) % len(out)
        return [None if i == at else i - (i > at) for i in range(len(out))]
    if name == "squeeze":
        return _squeeze(node, into)
    if name == "select":
        return _without(len(into), argument(node, 1, "dim", 0))
    if name in _SCRAMBLING:
        return None
    if name in _SAME_INDEX:
        return list(range(len(out)))
    return _broadcast(out, into)


def _without(rank: int, dim: Any) -> list[int | None]:
    return [i for i in range(rank) if i != int(dim) % rank]


def _squeeze(node: fx.Node, into: tuple[Size, ...]) -> list[int | None]:
    dims = argument(node, 1, "dim")
    dims = range(len(into)) if dims is None else dims if isinstance(dims, list | tuple) else [dims]
    gone = {int(d) % len(into) for d in dims if same(into[int(d)], 1)}
    return [i for i in range(len(into)) if i not in gone]


def _reshape(out: tuple[Size, ...], into: tuple[Size, ...]) -> list[int | None]:
    """Axes of one size are the same if as many elements lie before them; several of size 1 (a single token, a single
    head) are matched from the right."""
    before, start = ([numel(shape[:i]) for i in range(len(shape))] for shape in (into, out))
    result: list[int | None] = []
    for j, size in enumerate(out):
        fitting = [i for i, s in enumerate(into) if same(s, size) and before[i] == start[j]]
        alike = sum(same(s, size) and start[j] == at for s, at in zip(out[j + 1 :], start[j + 1 :], strict=True))
        result.append(fitting[max(len(fitting) - 1 - alike, 0)] if fitting else None)
    return result


def _broadcast(out: tuple[Size, ...], into: tuple[Size, ...]) -> list[int | None]:
    shift = len(out) - len(into)
    return [j - shift if j >= shift and same(out[j], into[j - shift]) else None for j in range(len(out))]


def axis_before(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """The axis of ``source`` that the node's output axis runs along."""
    axes = axis_map(node, source)
    return axes[axis] if axes is not None and axis < len(axes) else None


def axis_after(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """The axis of the node's output that runs along an axis of ``source``."""
    axes = axis_map(node, source)
    return axes.index(axis) if axes is not None and axis in axes else None
