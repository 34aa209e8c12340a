"""The blocks of generated kernels: chosen when a file is printed, by a model of what a GPU has, never on a first call.

The choices are data (configs/*.json, see gatecc.codegen.triton.configs). The model knows registers, shared memory, how
many programs a multiprocessor holds at once, bytes and FLOPs. It rejects what cannot be good and orders the rest; no
GPU has confirmed its order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from gatecc.codegen.triton.configs import config, family, width
from gatecc.codegen.triton.parts import PARTS, Part
from gatecc.codegen.triton.sizes import block_of, cdiv

_PACKAGE = "gatecc.codegen.regions"
MAKES = {"nvidia": "sm_90", "amd": "gfx942"}  # the part that stands for a make
_LANES = {"nvidia": 32, "amd": 64}  # threads of a warp
_REGISTERS = 65536  # of a multiprocessor, 32 bits each
_ROWS = (16, 64, 1 << 30)  # up to so many rows a choice of its own
MANY = 4096  # rows that stand for more
WIDEST_MIDDLE = 128  # columns between two products that a program holds
COMPUTED = 48  # values of operands that a thread computes at once, beside its sums: of 96, ptxas spilled some on sm_100
LAUNCH = 2e-6  # seconds from one kernel to the next, an assumption


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

    tiles: values over rows and columns that are held at once behind the loop; whole: a program must have all columns;
    passes: how often it reads its rows before. ``first`` products of ``middle`` columns are summed in the same loop,
    for ``last`` ones of (rows, middle) by (middle, columns). ``lefts``: how many different left operands there are;
    ``reads``: how many tensors these are computed from; ``before``: values that are held at once where the operands of
    a block are computed; ``split``: what is summed is cut into parts, for programs of their own.
    """

    columns: int
    inner: int
    count: int
    tiles: int
    dtype: torch.dtype
    whole: bool
    passes: int = 0
    first: int = 0
    middle: int = 0
    last: int = 0
    lefts: int = 1
    reads: int = 1
    before: int = 0
    split: bool = False

    @property
    def held(self) -> int:
        """Columns of the first products that a program holds, one beside the other."""
        return self.first * block_of(self.middle) if self.first else 0


def product_blocks(p: Products, rows: int = MANY) -> dict[str, list[tuple[int, Blocks]]]:
    """By make, for up to so many rows: the best of the table. ``rows``: how many there are if there are many."""
    return {make: [(most, best(make, min(most, rows), p)[1]) for most in _ROWS] for make in MAKES}


def too_wide(p: Products) -> str | None:
    """Why a program cannot hold the first of products that follow each other."""
    if p.middle <= WIDEST_MIDDLE:
        return None
    again = cdiv(p.columns, 128)
    return (
        f"products that follow each other over {p.middle} columns: a program holds {WIDEST_MIDDLE}, and computes "
        f"the first anew for each of {again} blocks of columns; one after the other they are computed once"
    )


def loses(p: Products, rows: int) -> str | None:
    """Why a region of so many rows is better cut in two, on this machine's make of GPU: where one kernel takes longer
    than one after the other, by the model."""
    make = family()
    together = best(make, rows, p)[0][0]
    for what, apart in _cut(make, rows, p):
        if together > apart + LAUNCH:
            return (
                f"{what} and the product take longer in one kernel than one after the other, by its model: "
                f"{1e6 * together:.1f} us and not {1e6 * (apart + LAUNCH):.1f} on {MAKES[make]} with {rows} rows"
            )
    return None


def _cut(make: str, rows: int, p: Products) -> Iterator[tuple[str, float]]:
    """Each way to cut a region in two: what is computed by itself, and what both take without the second's launch."""
    bandwidth = PARTS[MAKES[make]].bandwidth
    if p.first:
        one = replace(p, count=p.first, columns=p.middle, first=0, last=0, tiles=p.first + 1, whole=False)
        two = replace(p, count=p.count + p.last, inner=p.middle, first=0, last=0, passes=0, lefts=1, reads=1)
        beside = _beside(make, rows, p) if p.count else 0.0
        yield "a product that it reads", best(make, rows, one)[0][0] + best(make, rows, two)[0][0] + beside
    if p.passes or p.reads > p.lefts:
        plain = best(make, rows, replace(p, passes=0, reads=p.lefts))[0][0]
        moved = rows * p.inner * p.dtype.itemsize * (p.reads + p.lefts)
        yield "what is before it", plain + moved / bandwidth
    if p.whole:
        plain = best(make, rows, replace(p, whole=False, tiles=p.count + p.last))[0][0]
        yield "a reduction of its rows", plain + 2 * rows * p.columns * p.dtype.itemsize / bandwidth


def _beside(make: str, rows: int, p: Products) -> float:
    """What products beside a chain take longer if they are summed over ``inner`` and not over ``middle``."""
    own = replace(p, first=0, last=0)
    return best(make, rows, own)[0][0] - best(make, rows, replace(own, inner=p.middle))[0][0]


def parts(make: str, count: int, block: int, programs: int) -> int:
    """Into how many parts ``count`` rows are cut that are summed over in so many at once, so that a GPU has work beside
    ``programs`` that share no sum: none of less than four blocks."""
    wanted = max(1, config(_PACKAGE, "over_rows", make=make)["programs"] // max(1, programs))
    return min(wanted, cdiv(count, 4 * block))


def best(make: str, rows: int, p: Products) -> tuple[tuple[float, float], Blocks]:
    """The blocks of the table that take least, and what they take (see ``seconds``)."""
    table = config(_PACKAGE, "matmul", width(p.dtype), make=make)
    part, found = PARTS[MAKES[make]], list[tuple[tuple[float, float], Blocks]]()
    for name in table:
        c = Blocks(**table[name])  # pyright: ignore[reportCallIssue]
        most = max(16, c.cols // _power(max(1, p.count + p.last)))
        cols = block_of(p.columns) if p.whole else block_of(p.columns, most)
        c = c._replace(
            cols=cols, inner=block_of(p.inner, max(16, c.inner // _power(p.lefts))), rows=block_of(rows, c.rows)
        )
        threads = _LANES[make] * c.warps
        while _computed(c, p) > COMPUTED * threads and _accesses(c, p) >= 2 * threads:
            c = c._replace(inner=c.inner // 2)
        c = c._replace(warps=max(1, min(c.warps, _accesses(c, p) // _LANES[make])))
        each = _computed(c, p) / (_LANES[make] * c.warps)
        cut = parts(make, p.inner, c.inner, cdiv(rows, c.rows) * cdiv(p.columns, c.cols)) if p.split else 1
        found.append(((float("inf"), each) if each > COMPUTED else seconds(c, part, rows, p, cut), c))
    return min(found)


def seconds(c: Blocks, part: Part, rows: int, p: Products, cut: int = 1) -> tuple[float, float]:
    """An estimate of a product's time on a part, and of it without memory; infinite for what does not fit. ``cut``:
    into so many parts is cut what is summed; they are written in float32, read and added up."""
    itemsize, threads = p.dtype.itemsize, 32 * c.warps
    across = p.count * c.cols + p.held
    shared = max((c.rows * p.lefts + across) * c.inner * c.stages, p.last * p.held * c.cols) * itemsize
    held = c.rows * across  # accumulators
    if p.dtype == torch.float32:
        held += 3 * (c.rows + c.cols) * c.inner // 2  # operands in three parts
    held += _computed(c, p)
    behind = c.rows * max((p.count + p.last) * c.cols + p.held, p.tiles * c.cols)
    if shared > part.shared or max(held, behind) / threads > 128:
        return float("inf"), behind / threads
    at_once = max(1, min(part.shared // (shared + 1024), _REGISTERS // max(1, 2 * held), 2048 // threads))
    programs, inner = cdiv(rows, c.rows) * cdiv(p.columns, c.cols) * cut, cdiv(p.inner, cut)
    at_once = min(at_once, cdiv(programs, part.units))  # few programs share no multiprocessor
    waves = cdiv(programs, part.units * at_once)
    small = min(1.0, c.rows * c.cols / (128 * 128)) ** 0.35 * min(1.0, at_once * c.warps / 8)
    multiplied = across * inner + p.last * p.held * c.cols
    flops = 2 * c.rows * multiplied * at_once / (part.rate(p.dtype) / part.units * small)
    read = (c.rows * (p.reads + p.passes) + across) * inner + p.last * p.held * c.cols
    fed = read * itemsize * at_once / (2 * part.bandwidth / part.units)
    weights = p.inner * (p.count * p.columns + p.first * p.middle) + p.last * p.middle * p.columns
    least = (rows * p.inner * p.reads + weights + rows * p.columns) * itemsize / part.bandwidth
    busy = waves * max(flops, fed)
    added = 8 * cut * rows * p.columns / part.bandwidth + LAUNCH if cut > 1 else 0.0
    return max(busy, least) + added, busy


def _computed(c: Blocks, p: Products) -> int:
    """How many values are held at once where the operands of a block are computed: left ones, of a sum over rows
    either, which lie both in registers before they are multiplied."""
    return c.inner * (max(p.before * max(c.rows, c.cols), c.rows + c.cols) if p.split else p.before * c.rows)


def _accesses(c: Blocks, p: Products) -> int:
    """How many there are of 16 bytes to a block of the left operand."""
    return c.rows * c.inner * p.dtype.itemsize // 16


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
