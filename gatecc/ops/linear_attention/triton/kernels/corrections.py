"""The delta rules inside a chunk: what tokens find missing in the state, all at once instead of one by one.

e_i = r_i - sum_{j<i} W_ij beta_j e_j, with r_i = v_i - (what the state before the chunk holds) and W_ij = k_i · k_j
times the gates after j up to i, is a triangular system in the tokens of a chunk (the UT transform, Yang et al. 2024,
Parallelizing Linear Transformers with the Delta Rule). u = beta e is what is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gatecc.ops.linear_attention.triton.kernels.blocks import (
    chunk,
    column,
    diagonal,
    factors,
    gates,
    lower,
    put,
    since,
    tile,
    total,
    until,
    weights,
)


@triton.jit
def _unit_inverse(below, C: tl.constexpr):
    """The inverse of 1 + below, row by row; below: (C, C), zero on and above its diagonal.

    Products of powers would take fewer steps, and lose all digits where keys are alike.
    """
    i = tl.arange(0, C)
    found = tl.where(diagonal(C), 1.0, 0.0)
    for n in range(1, C):
        here = (i == n)[:, None]
        row = tl.sum(tl.where(here, below, 0.0), 0)
        found = tl.where(here, found - tl.sum(row[:, None] * found, 0)[None, :], found)
    return found


@triton.jit
def solve(
    q,
    k,
    g,
    beta,
    asks,
    reads,
    writes,
    kept,
    overlaps,
    inverses,
    chunks,
    heads,
    scale,
    DK: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    REVERSE: tl.constexpr,
    NORMALIZER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W, zero on and above the diagonal, and (1 + W diag(beta))^-1 of one chunk of one head: (chunks, H, C, C).

    With decays also what the kernels of the states, which go through a sequence in order, are to find ready: the keys
    as they read the state before the chunk and as they write that after it, the gates of the whole chunk,
    (chunks, H, Dk), and if there are ``asks`` the queries as they read.
    """
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, tokens, valid = chunk(chunks, index, C, REVERSE)
    inner = tl.zeros((C, C), tl.float32)
    for first in range(0, DK, BK):
        keys = first + tl.arange(0, BK)
        key = tile(k, row, head, tokens, valid, keys, DK)
        if g is not None:
            high, low = gates(g, row, head, tokens, valid, keys, DK, NORMALIZER)
            inner += weights(key, key, high, low, C, LEVELS, PRECISION)
            since_start = factors(since(C), high, low)
            put(reads, row, head, tokens, valid, keys, key * since_start, DK)
            if asks is not None:
                query = tile(q, row, head, tokens, valid, keys, DK) * scale
                put(asks, row, head, tokens, valid, keys, query * since_start, DK)
            put(writes, row, head, tokens, valid, keys, key * factors(until(C), high, low), DK)
            tl.store(kept + (index * heads + head) * DK + keys, total(high, low), mask=keys < DK)
        else:
            inner = tl.dot(key, tl.trans(key), inner, input_precision=PRECISION)
    inner = tl.where(lower(C), inner, 0.0)
    strength = column(beta, row, head, tokens, valid)
    place = square(index, head, heads, C)
    tl.store(overlaps + place, inner)
    tl.store(inverses + place, _unit_inverse(inner * strength[None, :], C))


@triton.jit
def square(index, head, heads, C: tl.constexpr):
    """Where a matrix lies in a contiguous (chunks, H, C, C)."""
    i = tl.arange(0, C)
    return (index * heads + head) * C * C + i[:, None] * C + i[None, :]


@triton.jit
def strengths(
    e,
    de,
    du,
    dbeta,
    overlaps,
    chunks,
    heads,
    DV: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of beta in one chunk of one head: e_i · (du - W^T de)_i, where du is that of u from outside."""
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, tokens, valid = chunk(chunks, index, C, REVERSE)
    overlap = tl.load(overlaps + square(index, head, heads, C))
    found = tl.zeros((C,), tl.float32)
    for first in range(0, DV, BV):
        values = first + tl.arange(0, BV)
        missing = tile(e, row, head, tokens, valid, values, DV)
        dmissing = tile(de, row, head, tokens, valid, values, DV)
        dwritten = tile(du, row, head, tokens, valid, values, DV)
        dwritten -= tl.dot(tl.trans(overlap), dmissing, input_precision=PRECISION)
        found += tl.sum(missing * dwritten, 1)
    base = dbeta.at + row * dbeta.row + (head // dbeta.group) * dbeta.head
    tl.store(base + tokens * dbeta.token, found, mask=valid)
