"""What kernels are given besides numbers: operands with their strides, and the sizes of blocks."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gatecc.codegen.triton.configs import config, width

Kernel = Literal["project", "activate", "outer", "add_slots"]


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


def blocks(kernel: Kernel, dtype: torch.dtype, load: str) -> Blocks:
    """The blocks of a kernel on this machine's make of GPU, for inputs of a dtype."""
    return Blocks(**config(__package__ or "", kernel, width(dtype), load))


def load(slots: int, experts: int) -> str:
    """How many rows an expert has, in a word."""
    rows = slots / max(1, experts)
    return "few" if rows <= FEW else "some" if rows < MANY else "many"


def rows(x: Tensor | None) -> Rows | None:
    """x: (rows, columns), as kernels see it."""
    return None if x is None else Rows(x, *x.stride())


def matrices(w: Tensor | None) -> Matrices | None:
    """w: (E, rows, columns), as kernels see it."""
    return None if w is None else Matrices(w, *w.stride())
