"""over_rows: kernels that sum over rows, which is what gradients of weights, biases and scales are.

A program takes a part of the rows and a block of the result, and computes what it multiplies or sums as it reads; the
parts are added up behind, in one order, so that a result is the same in every run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from gatecc.codegen.regions.alive import most_alive
from gatecc.codegen.regions.blocks import MANY, Blocks, Products, product_blocks, rowwise_blocks
from gatecc.codegen.regions.body import Body, Space, counts
from gatecc.codegen.regions.region import (
    REDUCTIONS,
    TRANSPOSES,
    RefusedError,
    Region,
    ancestors,
    check_node,
    dtype,
    leading_sizes,
    name_of,
    rows_of,
    same_elements,
    shape,
)
from gatecc.codegen.regions.rowwise import Printed

PART = """    # A part of the rows for each program; the parts are added up behind.
    each = tl.cdiv(tl.cdiv(count, {block}), tl.num_programs(1)) * {block}
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, count)
"""
PRODUCT = """@triton.jit
def kernel({arguments}, {counts}, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
           PRECISION: tl.constexpr):
    across = tl.cdiv({N}, BLOCK_COLS)
    down = tl.program_id(0) // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(0) % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    down_mask, col_mask = down < {M}, cols < {N}
{part}    product = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(begin, end, BLOCK_INNER):
        rows = (start + tl.arange(0, BLOCK_INNER)).to(tl.int64)
        row_mask = rows < end
        mask = row_mask[:, None] & col_mask[None, :]
{loop}        product = tl.dot(tl.trans(left), right, product, input_precision=PRECISION)
    place = (tl.program_id(1).to(tl.int64) * {M} + down[:, None]) * {N} + cols[None, :]
    tl.store(out0 + place, product, mask=down_mask[:, None] & col_mask[None, :])
"""
SUMS = """@triton.jit
def kernel({arguments}, {counts}, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = cols < {N}
{part}{begun}    for start in range(begin, end, BLOCK_ROWS):
        rows = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = rows < end
        mask = row_mask[:, None] & col_mask[None, :]
{loop}{stored}"""
_TYPES = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}


def is_row_product(node: fx.Node) -> bool:
    """Whether a node is a^T b, of two values that run over rows."""
    return node.op == "call_function" and name_of(node) == "mm" and _turned(node.args[0])[1]


def is_row_sum(node: fx.Node) -> bool:
    """Whether a node is a sum over all rows."""
    if node.op != "call_function" or name_of(node) != "sum":
        return False
    given: Any = node.args[0]
    rank = len(shape(given))
    axes: Any = node.args[1] if len(node.args) > 1 else None
    return rank > 1 and isinstance(axes, list | tuple) and sorted(a % rank for a in axes) == list(range(rank - 1))


def operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """What a sum over rows reads: values that run over rows."""
    first: Any = node.args[0]
    if not is_row_product(node):
        return (same_elements(first),)
    second: Any = node.args[1]
    return same_elements(_turned(first)[0]), same_elements(second)


def _turned(node: Any) -> tuple[fx.Node, bool]:
    turned = False
    while node.op == "call_function" and name_of(node) in TRANSPOSES:
        turned, node = not turned, node.args[0]
    return node, turned


def checked_sums(graph: fx.Graph, notes: tuple[str, ...]) -> Region:
    """The region of a graph whose results are sums over rows: a product, or sums of one width. Raises RefusedError."""
    results: Any = graph.output_node().args[0]
    for node in graph.nodes:
        if node not in results:
            check_node(node)
    read = [x for n in results for x in operands(n)]
    counts, widths = {math.prod(shape(x)[:-1]) for x in read}, {shape(x)[-1] for x in read}
    if len(counts) > 1 or (len(widths) > 1 and not is_row_product(results[0])):
        raise RefusedError("sums over different rows")
    region = Region(graph, leading_sizes(graph, counts.pop(), widths), (), notes)
    if not any(rows_of(shape(n)[:-1], region.rows) == "all" for n in region.inputs):
        raise RefusedError("no input has all rows that are summed over")
    return region


def print_sums(region: Region) -> Printed:
    """The kernel of sums over rows. Raises RefusedError."""
    return _product(region) if is_row_product(region.outputs[0]) else _sums(region)


def _product(region: Region) -> Printed:
    (node,) = region.outputs
    left, right = operands(node)
    M, N = shape(left)[-1], shape(right)[-1]
    loop, before = list[str](), 0
    spaces = Space("rows", "down", "row_mask", "down_mask", M), Space("rows", "cols", "row_mask", "col_mask", N)
    for name, side, space in (("left", left, spaces[0]), ("right", right, spaces[1])):
        body = Body(region, space, in_blocks=True)
        found = body.value(side)
        if found.kind != "tile":
            raise RefusedError("a sum over rows of what is the same in all of them")
        text = found.text if side.op == "placeholder" else f"tl.where(row_mask[:, None], {found.text}, 0.0)"
        loop += [*body.outside, *body.lines, f"{name} = {text}.to({_TYPES[dtype(side)]})"]
        before = max(before, 0 if side.op == "placeholder" else most_alive(body.lines, body.tiles()))
    blocks = {
        make: [(0, choices[-1][1])]
        for make, choices in product_blocks(
            Products(N, MANY, 1, 1, dtype(left), whole=False, before=before, split=True), rows=M
        ).items()
    }
    sizes = {"arguments": _arguments(region), "counts": counts(region, loop)}
    text = PRODUCT.format(**sizes, M=M, N=N, part=PART.format(block="BLOCK_INNER"), loop=_in(loop))
    constants = f", BLOCK_INNER=blocks.inner, PRECISION=precision({left.meta['val'].dtype})"
    down = f"cdiv({M}, blocks.rows) * cdiv({N}, blocks.cols)"
    return _printed(region, text, blocks, down, "inner", [(M, N)], constants)


def _sums(region: Region) -> Printed:
    width = shape(operands(region.outputs[0])[0])[-1]
    if width < 2:
        raise RefusedError("a sum over rows of a single column")
    body = Body(region, Space("rows", "cols", "row_mask", "col_mask", width))
    begun, stored = list[str](), list[str]()
    for i, node in enumerate(region.outputs):
        found = body.value(operands(node)[0])
        if found.kind != "tile":
            raise RefusedError("a sum over rows of what is the same in all of them")
        body.lines.append(f"sum{i} += tl.sum(tl.where(mask, {found.text}, 0.0), 0)[None, :]")
        begun.append(f"    sum{i} = tl.zeros((1, BLOCK_COLS), tl.float32)\n")
        place = f"out{i} + tl.program_id(1) * {width} + cols[None, :]"
        stored.append(f"    tl.store({place}, sum{i}, mask=col_mask[None, :])\n")
    reduces = any(name_of(n) in REDUCTIONS for n in ancestors([operands(n)[0] for n in region.outputs]))
    blocks = rowwise_blocks(width, most_alive(body.lines, body.tiles()), reduces=reduces)
    text = SUMS.format(
        arguments=_arguments(region),
        counts=counts(region, body.lines),
        N=width,
        part=PART.format(block="BLOCK_ROWS"),
        begun="".join(begun),
        loop=_in(body.lines),
        stored="".join(stored),
    )
    found = {make: [(0, b)] for make, b in blocks.items()}
    return _printed(region, text, found, f"cdiv({width}, blocks.cols)", "rows", [(width,)] * len(stored))


def _printed(
    region: Region,
    text: str,
    blocks: dict[str, list[tuple[int, Blocks]]],
    programs: str,
    block: str,
    sizes: list[tuple[int, ...]],
    constants: str = "",
) -> Printed:
    leader = region.leader.name
    fresh = [f"parts = parts_of(count, blocks.{block}, {programs})"]
    finish = list[str]()
    for i, (size, node) in enumerate(zip(sizes, region.outputs, strict=True)):
        each = ", ".join(map(str, size))
        fresh.append(f"out{i} = torch.empty([parts, {each}], dtype=torch.float32, device={leader}.device)")
        finish.append(f"out{i} = out{i}.sum(0).to({dtype(node)}).view({list(shape(node))})")
    given, grid = counts(region, [text]), f"({programs}, parts)"
    return Printed(text, blocks, grid, constants, fresh=tuple(fresh), finish=tuple(finish), counts=given)


def _arguments(region: Region) -> str:
    return ", ".join([*(n.name for n in region.inputs), *(f"out{i}" for i in range(len(region.outputs)))])


def _in(lines: list[str]) -> str:
    return "".join(f"        {line}\n" for line in lines)
