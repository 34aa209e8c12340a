"""Packing: queries, keys and values with tokens before heads, and as one product where they read one value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from gatecc.codegen.onnx.lower.views import Views
from gatecc.codegen.onnx.lower.write import Writer, aten
from gatecc.ir.match.axes import permutation
from gatecc.ir.ops import RESHAPES, SAME_SHAPE, TRANSPOSES, named, opname
from gatecc.ir.program import Program
from gatecc.ir.sizes import node_shape, same

_TAKES = RESHAPES | TRANSPOSES | SAME_SHAPE | frozenset(("unbind", "select", "getitem", "split", "chunk"))
_SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split")


def tokens_first(writer: Writer, views: Views, node: fx.Node) -> fx.Node:
    """(B, heads, N, D) as (B, N, heads * D): what was split into heads, if that is all that was done to it."""
    B, H, N, D = node.meta["val"].shape
    stacked = _stacked(views, node)
    if stacked is not None:
        return _piece(writer, *stacked)
    turned = views.settled(writer.call(aten.transpose.int, views.settled(node), 1, 2))
    return views.settled(writer.call(aten.reshape.default, turned, [B, N, H * D]))


def _stacked(views: Views, node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """Of (B, heads, N, D) that was taken out of a product (B, N, pieces * heads * D), seen as (pieces, B, heads, N, D):
    the product, the number of pieces, and which one. None if it is nothing like that."""
    taken = views.settled(node)
    turned: Any
    number: Any
    if opname(taken) == "getitem" and isinstance(taken.args[0], fx.Node) and opname(taken.args[0]) == "unbind":
        turned, number, axis = taken.args[0].args[0], taken.args[1], named(taken.args[0], "dim")
    elif opname(taken) == "select":
        turned, axis, number = taken.args[:3]
    else:
        return None
    seen = turned.args[0] if isinstance(turned, fx.Node) and opname(turned) == "permute" else None
    whole = seen.args[0] if isinstance(seen, fx.Node) and opname(seen) in RESHAPES else None
    if not isinstance(turned, fx.Node) or not isinstance(seen, fx.Node) or not isinstance(whole, fx.Node):
        return None
    shape, given = node_shape(seen), node_shape(whole)
    if axis != 0 or shape is None or given is None or len(shape) != 5 or len(given) != 3:
        return None
    known = isinstance(number, int) and isinstance(given[2], int) and isinstance(shape[2], int)
    if not known or permutation(turned, 5) != [2, 0, 3, 1, 4] or not all(map(same, given[:2], shape[:2])):
        return None
    pieces = int(shape[2])
    return None if any(map(views.written, (taken, turned, seen, whole))) else (whole, pieces, int(number) % pieces)


def _piece(writer: Writer, whole: fx.Node, pieces: int, number: int) -> fx.Node:
    """One of equal pieces of the last axis; all are those of one split."""
    width = int(whole.meta["val"].shape[2]) // pieces
    before = [n for n in whole.users if n < writer.place]
    known = next((n for n in before if opname(n) == "split" and n.args == (whole, width, 2)), None)
    split = writer.call(aten.split.Tensor, whole, width, 2) if known is None else known
    return writer.call(operator.getitem, split, number)


def packed(
    writer: Writer, views: Views, q: fx.Node, k: fx.Node, v: fx.Node
) -> tuple[tuple[fx.Node, fx.Node | None, fx.Node | None], float]:
    """The three with tokens first, or one value with all of them where there is one or can be made; and a number that
    queries or keys were multiplied by, which the scores are to be multiplied by instead."""
    parts, factor = _plain(writer, views, q, k, v)
    whole = _split(parts)
    if whole is None and _alike(writer.program, parts):
        whole = _one_product(writer, parts)
    return ((parts[0], parts[1], parts[2]) if whole is None else (whole, None, None)), factor


def unbiased(
    writer: Writer, views: Views, q: fx.Node, k: fx.Node, v: fx.Node
) -> tuple[list[fx.Node], fx.Node | None, float]:
    """The three with tokens first and without the biases of their products; the biases, one after the other; and what
    the scores are to be multiplied by."""
    parts, factor = _plain(writer, views, q, k, v)
    biased = [_has_bias(p) for p in parts]
    if not any(biased) or factor != 1.0:
        return parts, None, factor
    widths = [int(p.meta["val"].shape[-1]) for p in parts]
    biases = [p.args[2] if b else _zeros(writer, p) for p, b in zip(parts, biased, strict=True)]
    bias = writer.call(aten.cat.default, biases, 0)
    assert sum(widths) == bias.meta["val"].shape[0]
    plain = [writer.called(p, aten.linear.default, *p.args[:2]) if b else p for p, b in zip(parts, biased, strict=True)]
    return plain, bias, factor


def one_projection(
    writer: Writer, views: Views, q: fx.Node, k: fx.Node, v: fx.Node
) -> tuple[tuple[fx.Node, fx.Node, fx.Node | None], float] | None:
    """The value (B, N, C) that all three are products of, the weights of all as one matrix (C, columns), and the
    biases; and what the scores are to be multiplied by. None if they are no products of one value, or others read
    them."""
    parts, factor = _plain(writer, views, q, k, v)
    product = _split(parts)
    if product is None and _alike(writer.program, parts):
        product = _one_product(writer, parts)
    if product is None or opname(product) != "linear":
        return None
    apart = _taken_apart(product, (q, k, v))
    if any(user.op == "call_function" and opname(user) not in _SPLITS and user not in apart for user in product.users):
        return None
    x, weight, bias = product.args
    assert isinstance(x, fx.Node)
    if len(x.meta["val"].shape) != 3:
        return None
    turned = writer.call(aten.t.default, weight)
    return (x, turned, bias if isinstance(bias, fx.Node) else None), factor


def _taken_apart(product: fx.Node, parts: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes by which these parts are taken out of a product: they go with what is lowered."""
    found: set[fx.Node] = set()
    for node in parts:
        while node is not product and opname(node) in _TAKES and isinstance(node.args[0], fx.Node):
            found.add(node)
            node = node.args[0]
    return found


def _has_bias(node: fx.Node) -> bool:
    return opname(node) == "linear" and isinstance(node.args[2], fx.Node) and len(node.users) == 1


def _plain(writer: Writer, views: Views, q: fx.Node, k: fx.Node, v: fx.Node) -> tuple[list[fx.Node], float]:
    parts = [tokens_first(writer, views, node) for node in (q, k, v)]
    factor = 1.0
    for i in range(2):
        parts[i], times = _unscaled(parts[i], views)
        factor *= times
    return parts, factor


def _unscaled(node: fx.Node, views: Views) -> tuple[fx.Node, float]:
    """A value without the positive number that it is multiplied by."""
    if opname(node) not in ("mul", "div") or views.written(node) or len(node.users) > 1:
        return node, 1.0
    source, number = node.args[:2]
    if not isinstance(source, fx.Node) or not isinstance(number, int | float) or number <= 0:
        return node, 1.0
    return source, float(number) if opname(node) == "mul" else 1.0 / float(number)


def _split(parts: Sequence[fx.Node]) -> fx.Node | None:
    """What the parts are consecutive pieces of."""
    source = parts[0].args[0] if opname(parts[0]) == "getitem" else None
    if not isinstance(source, fx.Node) or opname(source) not in _SPLITS:
        return None
    whole = source.args[0]
    if not isinstance(whole, fx.Node) or len(source.meta["val"]) != len(parts):
        return None
    axis = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)
    consecutive = all(p.args == (source, i) for i, p in enumerate(parts))
    return whole if consecutive and axis in (-1, 2) else None


def _alike(program: Program, parts: Sequence[fx.Node]) -> bool:
    """Whether all are products of one value with weights, which nobody else reads."""
    if any(opname(p) != "linear" or len(p.users) > 1 for p in parts):
        return False
    weights = [w for p in parts for w in p.args[1:3] if w is not None]
    known = all(isinstance(w, fx.Node) and program.tensor(w) is not None for w in weights)
    return known and all(p.args[0] is parts[0].args[0] for p in parts)


def _one_product(writer: Writer, parts: Sequence[fx.Node]) -> fx.Node:
    weight = writer.call(aten.cat.default, [p.args[1] for p in parts], 0)
    bias = None
    if any(p.args[2] is not None for p in parts):
        bias = writer.call(aten.cat.default, [p.args[2] or _zeros(writer, p) for p in parts], 0)
    return writer.call(aten.linear.default, parts[0].args[0], weight, bias)


def _zeros(writer: Writer, product: fx.Node) -> fx.Node:
    held = product.meta["val"]
    width = int(held.shape[-1])
    return writer.constant(f"no_bias_{width}", torch.zeros(width, dtype=held.dtype))
