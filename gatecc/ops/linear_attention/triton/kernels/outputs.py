"""Outputs of a chunk from the state before it, and the gradient of its values from that of the state after it."""

from __future__ import annotations

import triton
import triton.language as tl

from gatecc.ops.linear_attention.triton.kernels.blocks import (
    chunk,
    factors,
    gates,
    put,
    since,
    state_tile,
    tile,
    until,
    weights,
)


@triton.jit
def mix(
    q,
    k,
    y,
    g,
    out,
    states,
    chunks,
    heads,
    scale,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    REVERSE: tl.constexpr,
    BACKWARD: tl.constexpr,
    NORMALIZER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk of one head, a block of its values.

    Forward o = (q, decayed) S + A v, with A the weights inside the chunk; backward dv = (k, decayed) dS + A^T do.
    Without ``states`` only the part with A.
    """
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    values = tl.program_id(2) * BV + tl.arange(0, BV)
    row, tokens, valid = chunk(chunks, index, C, REVERSE)
    inner = tl.zeros((C, C), tl.float32)
    found = tl.zeros((C, BV), tl.float32)
    for first in range(0, DK, BK):
        keys = first + tl.arange(0, BK)
        query = tile(q, row, head, tokens, valid, keys, DK) * scale
        key = tile(k, row, head, tokens, valid, keys, DK)
        reads = key if BACKWARD else query
        if g is not None:
            high, low = gates(g, row, head, tokens, valid, keys, DK, NORMALIZER)
            reads *= factors(until(C) if BACKWARD else since(C), high, low)
            inner += weights(query, key, high, low, C, LEVELS, PRECISION)
        else:
            inner = tl.dot(query, tl.trans(key), inner, input_precision=PRECISION)
        if states is not None:
            state = state_tile(states, index, head, heads, keys, values, DK, DV)
            found = tl.dot(reads, state, found, input_precision=PRECISION)
    inner = tl.where(since(C), inner, 0.0)
    value = tile(y, row, head, tokens, valid, values, DV)
    found = tl.dot(tl.trans(inner) if BACKWARD else inner, value, found, input_precision=PRECISION)
    put(out, row, head, tokens, valid, values, found, DV)
