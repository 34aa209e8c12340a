"""The blocks of generated kernels: chosen when a file is printed, by a model of what a GPU has, never on a first call.

The choices are data (configs/*.json, see gatecc.codegen.triton.configs). The model knows registers, shared memory, how
many programs a multiprocessor holds at once, bytes and FLOPs. It rejects what cannot be good and orders the rest; no
GPU has confirmed its order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from gatecc.codegen.triton.configs import config, width
from gatecc.codegen.triton.parts import PARTS, Part
from gatecc.codegen.triton.sizes import block_of, cdiv

_PACKAGE = "gatecc.codegen.regions"
MAKES = {"nvidia": "sm_90", "amd": "gfx942"}  # the part that stands for a make
_LANES = {"nvidia": 32, "amd": 64}  # threads of a warp
_REGISTERS = 65536  # of a multiprocessor, 32 bits each
_ROWS = (16, 64, 1 << 30)  # up to so many rows a choice of its own


class Blocks(NamedTuple):
    """What a program takes: rows, columns, of a product also what is summed at once; and what runs it."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int


def rowwise_blocks(width: int, tiles: int, *, reduces: bool) -> dict[str, Blocks]:
    """By make: whole rows if they are reduced, else parts of them. ``tiles``: values of a block, held at once."""
    found: dict[str, Blocks] = {}
    for make in MAKES:
        c = config(_PACKAGE, "rowwise", make=make)
        cols = block_of(width) if reduces else block_of(width, c["cols"])
        warps = max(c["warps"], cols // c["elements_per_warp"])
        warps = min(16, 1 << (warps - 1).bit_length())
        rows = max(1, c["elements_per_warp"] * warps // cols)
        while rows > 1 and rows * cols * tiles > c["held_per_warp"] * warps:
            rows //= 2
        found[make] = Blocks(rows, cols, 0, warps, 1)
    return found


@dataclass(frozen=True)
class Products:
    """What a region multiplies: so many products of (rows, inner) by (inner, columns), summed in one loop.

    tiles: values over rows and columns that are held at once behind the loop; whole: a program must have all columns.
    """

    columns: int
    inner: int
    count: int
    tiles: int
    dtype: torch.dtype
    whole: bool


def product_blocks(p: Products) -> dict[str, list[tuple[int, Blocks]]]:
    """By make, for up to so many rows: the best of the table."""
    return {make: [(most, _best(make, min(most, 4096), p)) for most in _ROWS] for make in MAKES}


def _best(make: str, rows: int, p: Products) -> Blocks:
    table = config(_PACKAGE, "matmul", width(p.dtype), make=make)
    part, found = PARTS[MAKES[make]], list[tuple[tuple[float, float], Blocks]]()
    for name in table:
        c = Blocks(**table[name])  # pyright: ignore[reportCallIssue]
        cols = block_of(p.columns) if p.whole else block_of(p.columns, max(16, c.cols // _power(p.count)))
        c = c._replace(cols=cols, inner=block_of(p.inner, c.inner), rows=block_of(rows, c.rows))
        widest = c.rows * c.inner * p.dtype.itemsize // 16  # accesses of 16 bytes to a block of the left operand
        c = c._replace(warps=max(1, min(c.warps, widest // _LANES[make])))
        found.append((seconds(c, part, rows, p), c))
    return min(found)[1]


def seconds(c: Blocks, part: Part, rows: int, p: Products) -> tuple[float, float]:
    """An estimate of a product's time on a part, and of it without memory; infinite for what does not fit."""
    itemsize, threads = p.dtype.itemsize, 32 * c.warps
    shared = (c.rows + p.count * c.cols) * c.inner * itemsize * c.stages
    held = c.rows * c.cols * p.count  # accumulators
    if p.dtype == torch.float32:
        held += 3 * (c.rows + c.cols) * c.inner // 2  # operands in three parts
    behind = c.rows * c.cols * max(p.count, p.tiles)
    if shared > part.shared or max(held, behind) / threads > 128:
        return float("inf"), behind / threads
    at_once = max(1, min(part.shared // (shared + 1024), _REGISTERS // max(1, 2 * held), 2048 // threads))
    programs = cdiv(rows, c.rows) * cdiv(p.columns, c.cols)
    waves = cdiv(programs, part.units * at_once)
    small = min(1.0, c.rows * c.cols / (128 * 128)) ** 0.35 * min(1.0, at_once * c.warps / 8)
    flops = 2 * c.rows * c.cols * p.inner * p.count * at_once / (part.rate(p.dtype) / part.units * small)
    fed = (c.rows + p.count * c.cols) * p.inner * itemsize * at_once / (2 * part.bandwidth / part.units)
    least = (rows * p.inner + p.count * p.inner * p.columns + rows * p.columns) * itemsize / part.bandwidth
    busy = waves * max(flops, fed)
    return max(busy, least), busy


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
