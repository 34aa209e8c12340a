"""chain: the products of a region, by which of them read others."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from gatecc.codegen.regions.region import (
    TRANSPOSES,
    RefusedError,
    Region,
    ancestors,
    dtype,
    name_of,
    shape,
)


class Chain(NamedTuple):
    """``first``: products that only ``last`` ones read, of ``middle`` columns; ``beside``: those that have no part in
    this. first and beside sum over ``inner``, last and beside have the region's columns."""

    first: tuple[fx.Node, ...]
    beside: tuple[fx.Node, ...]
    last: tuple[fx.Node, ...]
    inner: int
    middle: int


def chain_of(region: Region) -> Chain:
    """Raises RefusedError where the products of a region are no such chain."""
    products = set(region.products)
    below = {p: ancestors([left_of(p)]) & products for p in region.products}
    last = tuple(p for p in region.products if below[p])
    read = {q for p in last for q in below[p]}
    if read.intersection(last):
        raise RefusedError("three products that follow each other")
    if read & ancestors(region.outputs, upto=last):
        raise RefusedError("a product that is read by another product and by a result")
    first = tuple(p for p in region.products if p in read)
    beside = tuple(p for p in region.products if p not in read and p not in last)
    summed = {shape(left_of(p))[-1] for p in (*first, *beside)}
    between = {shape(p)[-1] for p in first} | {shape(left_of(p))[-1] for p in last}
    columns = {shape(p)[-1] for p in (*beside, *last)}
    if max(map(len, (summed, between, columns))) > 1:
        shapes = sorted({(*shape(left_of(p)), shape(p)[-1]) for p in region.products})
        raise RefusedError(f"products of different shapes: {shapes}")
    sides = {operand(p): is_transposed(p) for p in region.products}
    if any(sides[operand(p)] != is_transposed(p) for p in region.products):
        raise RefusedError("a matrix that is multiplied both as it is and transposed")
    return Chain(first, beside, last, summed.pop(), between.pop() if between else 0)


def left_of(product: fx.Node) -> fx.Node:
    """The left operand of a product."""
    left = product.args[-2]
    if not isinstance(left, fx.Node):
        raise RefusedError("a product whose left operand is no tensor")
    return left


def operand(product: fx.Node) -> fx.Node:
    """The input that is the right operand."""
    if name_of(product) == "addmm" and (product.kwargs.get("alpha", 1), product.kwargs.get("beta", 1)) != (1, 1):
        raise RefusedError("a product that is scaled")
    right, _ = _right(product)
    if right.op != "placeholder":
        raise RefusedError("a product whose right operand is computed")
    if len(shape(right)) != 2 or dtype(right) == torch.bool:
        raise RefusedError("a right operand that is no matrix of numbers")
    return right


def is_transposed(product: fx.Node) -> bool:
    """Whether the right operand is transposed."""
    return _right(product)[1]


def _right(product: fx.Node) -> tuple[fx.Node, bool]:
    right: Any = product.args[-1]
    transposed = False
    while isinstance(right, fx.Node) and right.op == "call_function" and name_of(right) in (*TRANSPOSES, "alias"):
        transposed ^= name_of(right) in TRANSPOSES
        right = right.args[0]
    return right, transposed
