"""Gradients of the experts' matrices: for each expert the sum over its rows of what came in times what goes out."""

from __future__ import annotations

import triton
import triton.language as tl

from gatecc.ops.moe_ffn.triton.kernels.projections import rows_of, tile


@triton.jit
def outer(
    a,
    b,
    weights,
    out,
    sums,
    order,
    edges,
    k,
    N: tl.constexpr,
    K: tl.constexpr,
    READ_A: tl.constexpr,
    READ_B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out_e = the sum over the rows of expert e of (weight a) b^T, (N, K), and sums_e that of weight a, (N,).

    A program takes one expert and one block of its matrix, and goes through the rows in their order: BM at a time.
    READ_A and READ_B say by what a and b have their rows.
    """
    expert = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.program_id(0) * BK + tl.arange(0, BK)
    start, end = tl.load(edges + expert), tl.load(edges + expert + 1)
    found = tl.zeros((BN, BK), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for first in range(start, end, BM):
        places = first + tl.arange(0, BM)
        inside = places < end
        slots = tl.load(order + places, mask=inside, other=0)
        left = tile(a, rows_of(places, slots, k, READ_A), inside, columns, N, N % BN == 0)
        if weights is not None:
            weight = tl.load(weights + slots, mask=inside, other=0.0).to(tl.float32)
            left = (left.to(tl.float32) * weight[:, None]).to(left.dtype)
        right = tile(b, rows_of(places, slots, k, READ_B), inside, inner, K, K % BK == 0)
        found = tl.dot(tl.trans(left), right, found, input_precision=PRECISION)
        if sums is not None:
            total += tl.sum(left.to(tl.float32), 0)
    at = out.at + expert * out.expert + columns[:, None] * out.row + inner[None, :] * out.column
    tl.store(at, found.to(out.at.dtype.element_ty), mask=(columns < N)[:, None] & (inner < K)[None, :])
    if sums is not None:
        once = (columns < N) & (tl.program_id(0) == 0)
        tl.store(sums.at + expert * sums.row + columns * sums.column, total.to(sums.at.dtype.element_ty), mask=once)
