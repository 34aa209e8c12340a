"""matmul: a kernel of products of matrices with one main loop, what comes before them and what is made of them.

All products of a region have one shape, and are summed in the same loop: the two halves of a gated unit, or a gate
beside a value. What comes before (the prologue) is computed on blocks of the left operand as they are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gatecc.codegen.regions.alive import most_alive
from gatecc.codegen.regions.blocks import Products, product_blocks
from gatecc.codegen.regions.body import Body, Space, Value
from gatecc.codegen.regions.region import (
    REDUCTIONS,
    TRANSPOSES,
    RefusedError,
    Region,
    dtype,
    name_of,
    shape,
)
from gatecc.codegen.regions.rowwise import Printed, stored

HEAD = """@triton.jit
def kernel({arguments}, count, {strides}, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
           BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr):
    # Programs that run at the same time take few rows and few columns, so that operands come from the cache.
    across = tl.cdiv({width}, BLOCK_COLS)
    down = tl.cdiv(count, BLOCK_ROWS)
    first = tl.program_id(0) // (8 * across) * 8
    turn = tl.program_id(0) % (8 * across)
    group = tl.minimum(down - first, 8)
    row_block, col_block = first + turn % group, turn // group
    rows = row_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = col_block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_mask, col_mask = rows < count, cols < {width}
    mask = row_mask[:, None] & col_mask[None, :]
"""
_TYPES = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}


def print_matmul(region: Region) -> Printed:
    """The kernel of a region with products. Raises RefusedError."""
    left, right = zip(*(_operands(p) for p in region.products), strict=True)
    K, N = shape(left[0])[-1], region.width
    before = Body(region, Space("rows", "inner", "row_mask", "inner_mask", K))
    if any(name_of(n) in (*REDUCTIONS, "mm", "addmm") for a in left for n in _ancestors(a)):
        raise RefusedError("a product reads rows that are reduced, or another product")
    weights = list(dict.fromkeys(w for w, _ in right))
    loop = [line for a in dict.fromkeys(left) for line in _left(before, a)]
    loop += [line for w, _ in right for line in _right(w)]
    loop = list(dict.fromkeys(loop))
    for i, (a, (w, _)) in enumerate(zip(left, right, strict=True)):
        loop.append(f"product{i} = tl.dot({_block(a)}, {w.name}_right, product{i}, input_precision=PRECISION)")
    known = {p: Value(f"product{i}", "tile") for i, p in enumerate(region.products)}
    after = Body(region, Space("rows", "cols", "row_mask", "col_mask", N, first="col_block == 0"), known)
    for i, p in enumerate(region.products):
        after.lines += _shifted(after, p, i)
    after.lines += [stored(after, output, i) for i, output in enumerate(region.outputs)]
    text = _text(region, weights, loop, after.lines, K)
    reduces = any(name_of(n) in REDUCTIONS for n in region.calls)
    tiles = most_alive(after.lines, after.tiles())
    blocks = product_blocks(Products(N, K, len(region.products), tiles, dtype(left[0]), reduces))
    strides = ", ".join(f"{w.name}.stride({axis})" for w in weights for axis in _axes(w, dict(right)[w]))
    grid = f"(cdiv(count, blocks.rows) * cdiv({N}, blocks.cols),)"
    constants = f", BLOCK_INNER=blocks.inner, PRECISION=precision({left[0].meta['val'].dtype})"
    return Printed(text, blocks, grid, constants, f", {strides}")


def _text(region: Region, weights: list[fx.Node], loop: list[str], after: list[str], K: int) -> str:
    arguments = ", ".join([*(n.name for n in region.inputs), *(f"out{i}" for i in range(len(region.outputs)))])
    strides = ", ".join(f"{w.name}_inner, {w.name}_col" for w in weights)
    lines = [f"product{i} = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)" for i in range(len(region.products))]
    lines += [f"for start in range(0, {K}, BLOCK_INNER):"]
    lines += [
        f"    {line}" for line in ("inner = start + tl.arange(0, BLOCK_INNER)", f"inner_mask = inner < {K}", *loop)
    ]
    head = HEAD.format(arguments=arguments, strides=strides, width=region.width)
    return head + "".join(f"    {line}\n" for line in (*lines, *after))


def _operands(product: fx.Node) -> tuple[fx.Node, tuple[fx.Node, bool]]:
    """The left operand; the input that is the right one, and whether it is transposed."""
    left, right = product.args[-2:]
    if name_of(product) == "addmm" and (product.kwargs.get("alpha", 1), product.kwargs.get("beta", 1)) != (1, 1):
        raise RefusedError("a product that is scaled")
    transposed = False
    while isinstance(right, fx.Node) and right.op == "call_function" and name_of(right) in (*TRANSPOSES, "alias"):
        transposed ^= name_of(right) in TRANSPOSES
        right = right.args[0]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or right.op != "placeholder":
        raise RefusedError("a product whose right operand is computed")
    if len(shape(right)) != 2 or dtype(right) == torch.bool:
        raise RefusedError("a right operand that is no matrix of numbers")
    return left, (right, transposed)


def _axes(weight: fx.Node, transposed: bool) -> tuple[int, int]:
    """The axes of a right operand that are summed over, and that are columns."""
    return (1, 0) if transposed else (0, 1)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, left = set[fx.Node](), [node]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def _left(body: Body, node: fx.Node) -> list[str]:
    """The lines that yield a block of a left operand."""
    before = len(body.lines)
    found = body.value(node)
    if found.kind != "tile":
        raise RefusedError("a left operand that does not run over rows")
    text, plain = found.text, _source(node).op == "placeholder"
    if not plain:  # what was computed where nothing was read may be no number
        text = f"tl.where(inner_mask[None, :], {text}, 0.0)"
    return [*body.lines[before:], f"{_block(node)} = {text}.to({_TYPES[dtype(node)]})"]


def _source(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and name_of(node) in ("view", "_unsafe_view", "reshape", "alias"):
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return node


def _block(node: fx.Node) -> str:
    return f"{node.name}_left"


def _right(weight: fx.Node) -> list[str]:
    """The line that reads a block of a right operand; its strides say what lies where."""
    place = f"inner[:, None] * {weight.name}_inner + cols[None, :] * {weight.name}_col"
    load = f"tl.load({weight.name} + {place}, mask=inner_mask[:, None] & col_mask[None, :], other=0.0)"
    return [f"{weight.name}_right = {load}"]


def _shifted(body: Body, product: fx.Node, index: int) -> list[str]:
    """The line that adds the bias of a product."""
    if name_of(product) != "addmm":
        return []
    bias: Any = product.args[0]
    before = len(body.lines)
    found = body.value(bias)
    lines = body.lines[before:]
    del body.lines[before:]
    return [*lines, f"product{index} += {found.text}"]
