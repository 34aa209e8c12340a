"""rowwise: a kernel of pointwise operators and reductions of rows, a block of rows (and columns) a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gatecc.codegen.regions.blocks import Blocks, rowwise_blocks
from gatecc.codegen.regions.body import Body, Space, counts
from gatecc.codegen.regions.region import REDUCTIONS, RefusedError, Region, name_of, rows_of, shape


@dataclass(frozen=True)
class Printed:
    """A kernel's text, its blocks by make of GPU and number of rows, and what its launcher says besides.

    ``fresh``: the lines that make room for results, where that is no tensor of each result's shape; ``finish``: those
    that make results of what the kernel wrote. ``counts``: the sizes that it is given, see body.counts. ``slower``:
    why it is better cut in two, by the model; None if it is not.
    """

    kernel: str
    blocks: dict[str, list[tuple[int, Blocks]]]
    grid: str
    constants: str = ""
    strides: str = ""
    fresh: tuple[str, ...] = ()
    finish: tuple[str, ...] = ()
    counts: str = "count"
    slower: str | None = None


HEAD = """@triton.jit
def kernel({arguments}, {counts}, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_mask, col_mask = rows < count, cols < {width}
    mask = row_mask[:, None] & col_mask[None, :]
"""


def print_rowwise(region: Region) -> Printed:
    """The kernel of a region without products. Raises RefusedError."""
    body = Body(region, Space("rows", "cols", "row_mask", "col_mask", region.width))
    for index, output in enumerate(region.outputs):
        body.lines.append(stored(body, output, index))
    arguments = ", ".join([*(n.name for n in region.inputs), *(f"out{i}" for i in range(len(region.outputs)))])
    sizes = counts(region, body.lines)
    text = HEAD.format(arguments=arguments, counts=sizes, width=region.width)
    text += "".join(f"    {line}\n" for line in body.lines)
    tiles = len(region.inputs) + len(region.outputs)
    reduces = any(name_of(n) in REDUCTIONS for n in region.calls)
    blocks = rowwise_blocks(region.width, tiles, reduces=reduces)
    grid = f"(cdiv(count, blocks.rows), cdiv({region.width}, blocks.cols))"
    return Printed(text, {make: [(0, b)] for make, b in blocks.items()}, grid, counts=sizes)


def stored(body: Body, output: Any, index: int) -> str:
    """The line that writes a result."""
    found, space, rows = body.value(output), body.space, body.region.rows
    sizes = shape(output)
    if found.literal or found.kind not in ("tile", "column"):
        raise RefusedError("a result that does not run over the rows")
    out = f"out{index}"
    value = f"{found.text}.to({out}.dtype.element_ty)"
    if found.kind == "tile":
        if sizes[-1] != space.width or rows_of(sizes[:-1], rows) != "all":
            raise RefusedError("a result that is not of all rows")
        return f"tl.store({out} + {space.rows}[:, None] * {space.width} + {space.cols}[None, :], {value}, mask=mask)"
    if rows_of(sizes, rows) != "all" and not (sizes[-1] == 1 and rows_of(sizes[:-1], rows) == "all"):
        raise RefusedError("a result of rows that was expanded")
    first = f"{space.row_mask}[:, None] & ({space.first})"
    return f"tl.store({out} + {space.rows}[:, None], {value}, mask={first})"
