"""Rows of a block times the matrix of its expert: what a forward pass and the gradients of rows are made of.

A program takes a block of the schedule, rows of one expert that lie together in its order, and some columns. Blocks of
expert E are the empty slots: they read no row and write zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gatecc.ops.moe_ffn.triton.kernels.activations import gated, pointwise


@triton.jit
def block(table, order, index, BM: tl.constexpr):
    """Expert, places in the order, slots at these places, and which of them exist."""
    entry = table + index * 3
    expert, first, count = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    step = tl.arange(0, BM)
    places, inside = first + step, step < count
    return expert, places, tl.load(order + places, mask=inside, other=0), inside


@triton.jit
def rows_of(places, slots, k, BY: tl.constexpr):
    """Where the rows of a block lie in an operand that has one for each place of the order, each slot, each token."""
    found = places
    if BY == "slot":
        found = slots
    elif BY == "token":
        found = slots // k
    return found


@triton.jit
def tile(x, rows, inside, columns, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Some columns of rows, zero where there is none: (rows, columns). ``EVEN``: all of the columns exist."""
    mask = inside[:, None] if EVEN else inside[:, None] & (columns < WIDTH)[None, :]
    return tl.load(x.at + rows[:, None] * x.row + columns[None, :] * x.column, mask=mask, other=0.0)


@triton.jit
def matrix(w, expert, columns, inner, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr):
    """A part of an expert's matrix, transposed: (inner, columns)."""
    mask = (columns < N)[None, :] if EVEN else (columns < N)[None, :] & (inner < K)[:, None]
    at = w.at + expert * w.expert
    return tl.load(at + columns[None, :] * w.row + inner[:, None] * w.column, mask=mask, other=0.0)


@triton.jit
def shift(found, bias, expert, columns, N: tl.constexpr):
    """With the expert's bias, (E, N), if there is one."""
    if bias is not None:
        found += tl.load(bias.at + expert * bias.row + columns * bias.column, mask=columns < N, other=0.0)[None, :]
    return found


@triton.jit
def project(
    x,
    w,
    bias,
    weights,
    y,
    order,
    table,
    k,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = (x W^T + b) times the weight of the slot. READ and WRITE say by what x and y have their rows."""
    expert, places, slots, inside = block(table, order, tl.program_id(0), BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    found = tl.zeros((BM, BN), tl.float32)
    if expert < E:
        rows = rows_of(places, slots, k, READ)
        for first in range(0, K, BK):
            inner = first + tl.arange(0, BK)
            part = matrix(w, expert, columns, inner, N, K, K % BK == 0)
            found = tl.dot(tile(x, rows, inside, inner, K, K % BK == 0), part, found, input_precision=PRECISION)
        found = shift(found, bias, expert, columns, N)
        if weights is not None:
            found *= tl.load(weights + slots, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = y.at + rows_of(places, slots, k, WRITE)[:, None] * y.row + columns[None, :] * y.column
    tl.store(at, found.to(y.at.dtype.element_ty), mask=inside[:, None] & (columns < N)[None, :])


@triton.jit
def activate(
    x,
    w,
    w_up,
    bias,
    bias_up,
    y,
    order,
    table,
    k,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    NAME: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = act(x W^T) (x U^T), or act(x W^T) without U (w_up), by place of the order; x has a row for each token."""
    expert, places, slots, inside = block(table, order, tl.program_id(0), BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    if expert < E:
        rows = slots // k
        found = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for first in range(0, K, BK):
            inner = first + tl.arange(0, BK)
            row = tile(x, rows, inside, inner, K, K % BK == 0)
            part = matrix(w, expert, columns, inner, N, K, K % BK == 0)
            found = tl.dot(row, part, found, input_precision=PRECISION)
            if w_up is not None:
                other = matrix(w_up, expert, columns, inner, N, K, K % BK == 0)
                up = tl.dot(row, other, up, input_precision=PRECISION)
        found = shift(found, bias, expert, columns, N)
        if w_up is not None:
            found = gated(found, shift(up, bias_up, expert, columns, N), NAME, A, B)
        else:
            found = pointwise(found, NAME, A)
        at = y.at + places[:, None] * y.row + columns[None, :] * y.column
        tl.store(at, found.to(y.at.dtype.element_ty), mask=inside[:, None] & (columns < N)[None, :])


@triton.jit
def add_slots(x, y, tokens, k, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """y_t = the sum of the k rows of token t in x, from the first slot to the last. x: float32."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < tokens)[:, None] & (columns < N)[None, :]
    found = tl.zeros((BM, BN), tl.float32)
    for j in range(k):
        found += tl.load(x.at + (rows * k + j)[:, None] * x.row + columns[None, :] * x.column, mask=inside, other=0.0)
    at = y.at + rows[:, None] * y.row + columns[None, :] * y.column
    tl.store(at, found.to(y.at.dtype.element_ty), mask=inside)
