"""matmul: a kernel of products of matrices with one main loop, what comes before them and what is made of them.

Products of one shape are summed in the same loop: the two halves of a gated unit, or a gate beside a value. What comes
before (the prologue) is computed on blocks of the left operand as they are read; a norm there reads its rows before. A
product of few columns may be read by another one (a gate of low rank): a program then holds its rows whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from gatecc.codegen.regions.alive import most_alive
from gatecc.codegen.regions.blocks import Products, loses, product_blocks, too_wide
from gatecc.codegen.regions.body import Body, Space, Value, counts
from gatecc.codegen.regions.chain import chain_of, is_transposed, left_of, operand
from gatecc.codegen.regions.reduced import print_reduced
from gatecc.codegen.regions.region import RefusedError, Region, dtype, name_of, reduces_behind
from gatecc.codegen.regions.rowwise import Printed, stored
from gatecc.codegen.triton.sizes import block_of

HEAD = """@triton.jit
def kernel({arguments}, {counts}, {strides}, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
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
    chain = chain_of(region)
    K, N, middle = chain.inner, region.width, chain.middle
    looped, weights = [*chain.first, *chain.beside], [operand(p) for p in region.products]
    lefts = list(dict.fromkeys(left_of(p) for p in looped))
    inner = Space("rows", "inner", "row_mask", "inner_mask", K)
    reduced = print_reduced(region, inner, lefts, lambda lines: _loop(K, lines))
    before = Body(region, inner, reduced.known, in_blocks=True)
    lines = [line for a in lefts for line in _left(before, a)]
    computed = any(_source(a).op != "placeholder" for a in lefts)
    held = most_alive(lines, before.tiles()) if computed else 0
    lines += [line for p in looped for line in _right(operand(p), "inner", "middle" if p in chain.first else "cols")]
    lines = list(dict.fromkeys(lines))
    for p in looped:
        name = _name(region, p)
        lines.append(
            f"{name} = tl.dot({_block(left_of(p))}, {operand(p).name}_right, {name}, input_precision=PRECISION)"
        )
    found = {p: Value(_name(region, p), "tile") for p in region.products}
    between = Body(region, Space("rows", "middle", "row_mask", "middle_mask", middle), {**found, **before.shared()})
    for p in chain.first:
        _shift(between, p, found[p].text)
    for p in chain.last:
        between.lines += _left(between, left_of(p))
        between.lines += _right(operand(p), "middle", "cols")
        product = f"tl.dot({_block(left_of(p))}, {operand(p).name}_right, input_precision=PRECISION)"
        between.lines.append(f"{found[p].text} = {product}")
    known = {**{p: found[p] for p in (*chain.beside, *chain.last)}, **between.shared()}
    after = Body(region, Space("rows", "cols", "row_mask", "col_mask", N, first="col_block == 0"), known)
    for p in (*chain.beside, *chain.last):
        _shift(after, p, found[p].text)
    after.lines += [stored(after, output, i) for i, output in enumerate(region.outputs)]
    head = [*reduced.lines, *before.outside]
    if middle:
        head = [f"middle = tl.arange(0, {block_of(middle)})", f"middle_mask = middle < {middle}", *head]
    for p in looped:
        columns = block_of(middle) if p in chain.first else "BLOCK_COLS"
        head.append(f"{found[p].text} = tl.zeros((BLOCK_ROWS, {columns}), tl.float32)")
    text = _text(region, list(dict.fromkeys(weights)), [*head, *_loop(K, lines), *between.lines, *after.lines])
    shape_of = Products(
        N,
        K,
        len(chain.beside),
        most_alive([*between.lines, *after.lines], between.tiles() | after.tiles()),
        dtype(lefts[0]),
        reduces_behind(region),
        reduced.passes,
        len(chain.first),
        middle,
        len(chain.last),
        len(lefts),
        max(len(lefts), sum(n.op == "placeholder" and v.kind == "tile" for n, v in before.values.items())),
        held,
    )
    if reason := too_wide(shape_of):
        raise RefusedError(reason)
    strides = ", ".join(f"{w.name}.stride({axis})" for w in dict.fromkeys(weights) for axis in _axes(region, w))
    grid = f"(cdiv(count, blocks.rows) * cdiv({N}, blocks.cols),)"
    constants = f", BLOCK_INNER=blocks.inner, PRECISION=precision({lefts[0].meta['val'].dtype})"
    sizes = counts(region, text.splitlines())
    slower = loses(shape_of, math.prod(region.rows))
    return Printed(text, product_blocks(shape_of), grid, constants, f", {strides}", counts=sizes, slower=slower)


def _text(region: Region, weights: list[fx.Node], lines: list[str]) -> str:
    arguments = ", ".join([*(n.name for n in region.inputs), *(f"out{i}" for i in range(len(region.outputs)))])
    strides = ", ".join(f"{w.name}_inner, {w.name}_col" for w in weights)
    head = HEAD.format(arguments=arguments, counts=counts(region, lines), strides=strides, width=region.width)
    return head + "".join(f"    {line}\n" for line in lines)


def _loop(K: int, lines: list[str]) -> list[str]:
    """A loop over what is summed."""
    block = ["inner = start + tl.arange(0, BLOCK_INNER)", f"inner_mask = inner < {K}", *lines]
    return [f"for start in range(0, {K}, BLOCK_INNER):", *(f"    {line}" for line in block)]


def _name(region: Region, product: fx.Node) -> str:
    return f"product{region.products.index(product)}"


def _axes(region: Region, weight: fx.Node) -> tuple[int, int]:
    """The axes of a right operand that are summed over, and that are columns."""
    return (1, 0) if next(is_transposed(p) for p in region.products if operand(p) is weight) else (0, 1)


def _left(body: Body, node: fx.Node) -> list[str]:
    """The lines that yield a block of a left operand, which it takes from its body."""
    before = len(body.lines)
    found = body.value(node)
    if found.kind != "tile":
        raise RefusedError("a left operand that does not run over rows")
    text, plain = found.text, _source(node).op == "placeholder"
    if not plain:  # what was computed where nothing was read may be no number
        text = f"tl.where({body.space.col_mask}[None, :], {text}, 0.0)"
    lines = [*body.lines[before:], f"{_block(node)} = {text}.to({_TYPES[dtype(node)]})"]
    del body.lines[before:]
    return lines


def _source(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and name_of(node) in ("view", "_unsafe_view", "reshape", "alias"):
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return node


def _block(node: fx.Node) -> str:
    return f"{node.name}_left"


def _right(weight: fx.Node, inner: str, cols: str) -> list[str]:
    """The line that reads a block of a right operand; its strides say what lies where."""
    place = f"{inner}[:, None] * {weight.name}_inner + {cols}[None, :] * {weight.name}_col"
    masks = {"inner": "inner_mask", "middle": "middle_mask", "cols": "col_mask"}
    mask = f"{masks[inner]}[:, None] & {masks[cols]}[None, :]"
    return [f"{weight.name}_right = tl.load({weight.name} + {place}, mask={mask}, other=0.0)"]


def _shift(body: Body, product: fx.Node, name: str) -> None:
    """Add the bias of a product."""
    if name_of(product) == "addmm":
        bias: Any = product.args[0]
        found = body.value(bias)
        body.lines.append(f"{name} += {found.text}")
