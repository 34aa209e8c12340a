"""What kernels are given besides numbers: operands with their strides, and the sizes of blocks."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kernel = Literal["project", "activate", "outer"]


class Rows(NamedTuple):
    """A tensor (rows, columns) as kernels see it."""

    at: Tensor
    row: int
    column: int


class Matrices(NamedTuple):
    """Stacked matrices (E, rows, columns) as kernels see them."""

    at: Tensor
    expert: int
    row: int
    column: int


class Blocks(NamedTuple):
    """What a program takes: of rows, of columns of its result, of what it sums over, at most; and what runs it.

    Of ``outer``, which sums over rows, the last two are the sides of its part of a matrix.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


FEW, MANY = 16, 64  # rows of an expert, on the average: up to FEW a block has 16 rows; from MANY on, as many as can be
# Chosen ahead of time by what compilers report: no register is spilled, shared memory suffices (gatecc.codegen.judge).
# Columns of the table: few rows, some, many. Families: 16-bit inputs and float32 on NVIDIA, both on AMD.
BLOCKS: dict[str, dict[Kernel, tuple[Blocks, Blocks, Blocks]]] = {
    "nvidia, 16 bits": {
        "project": (Blocks(16, 64, 128, 4, 3), Blocks(64, 128, 64, 4, 3), Blocks(128, 128, 64, 8, 3)),
        "activate": (Blocks(16, 64, 64, 4, 3), Blocks(64, 64, 64, 4, 3), Blocks(128, 64, 64, 8, 3)),
        "outer": (Blocks(32, 128, 128, 8, 3), Blocks(32, 128, 128, 8, 3), Blocks(64, 128, 128, 8, 2)),
    },
    "nvidia, 32 bits": {
        "project": (Blocks(16, 64, 32, 4, 2), Blocks(64, 64, 32, 8, 2), Blocks(64, 64, 32, 8, 2)),
        "activate": (Blocks(16, 32, 32, 4, 2), Blocks(64, 32, 32, 8, 2), Blocks(64, 32, 32, 8, 2)),
        "outer": (Blocks(32, 64, 64, 8, 2), Blocks(32, 64, 64, 8, 2), Blocks(32, 64, 64, 8, 2)),
    },
    "amd": {
        "project": (Blocks(16, 64, 64, 4, 2), Blocks(64, 64, 64, 4, 2), Blocks(64, 64, 64, 4, 2)),
        "activate": (Blocks(16, 32, 64, 4, 2), Blocks(64, 32, 64, 4, 2), Blocks(64, 64, 32, 4, 2)),
        "outer": (Blocks(32, 64, 64, 4, 2), Blocks(32, 64, 64, 4, 2), Blocks(32, 64, 64, 4, 2)),
    },
}
SUM = Blocks(16, 128, 0, 4, 1)  # of the sum over slots, everywhere


def family(dtype: torch.dtype) -> str:
    """The row of the table for inputs of a dtype on this machine's make of GPU."""
    if torch.version.hip:
        return "amd"
    return "nvidia, 32 bits" if dtype == torch.float32 else "nvidia, 16 bits"


def load(slots: int, experts: int) -> int:
    """The column of the table."""
    rows = slots / max(1, experts)
    return 0 if rows <= FEW else 1 if rows < MANY else 2


def rows(x: Tensor | None) -> Rows | None:
    """x: (rows, columns), as kernels see it."""
    return None if x is None else Rows(x, *x.stride())


def matrices(w: Tensor | None) -> Matrices | None:
    """w: (E, rows, columns), as kernels see it."""
    return None if w is None else Matrices(w, *w.stride())
