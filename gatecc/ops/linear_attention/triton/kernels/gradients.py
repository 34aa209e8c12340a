"""Gradients of queries, keys and log decays of a chunk, from the state before it and that of the state after it."""

from __future__ import annotations

import triton
import triton.language as tl

from gatecc.ops.linear_attention.triton.kernels.blocks import (
    back,
    chunk,
    diagonal,
    factors,
    gates,
    lower,
    meeting,
    opposite,
    put,
    right,
    since,
    state_tile,
    tile,
    total,
    until,
)


@triton.jit
def differentiate(
    q,
    k,
    v,
    g,
    do,
    dq,
    dk,
    dg,
    states,
    grads,
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
    NORMALIZER: tl.constexpr,
    PER_HEAD: tl.constexpr,
    STRICT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk of one head, a block of its keys.

    A log decay is differentiated level by level: the gradient of each exponent goes to the tokens whose log decays it
    sums. That adds what crosses a token and nothing else, so a strong decay has an accurate gradient; the usual running
    sum of q dq - k dk is a small difference of large numbers there.

    Without ``grads`` the chunk is taken to write to no later one; a ``STRICT`` query does not see its own token. The
    second run of a delta rule has both: its keys read the state as queries do.
    """
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    keys = tl.program_id(2) * BK + tl.arange(0, BK)
    row, tokens, valid = chunk(chunks, index, C, REVERSE)
    met = tl.zeros((C, C), tl.float32)
    dquery = tl.zeros((C, BK), tl.float32)
    dkey = tl.zeros((C, BK), tl.float32)
    kept = tl.zeros((BK,), tl.float32)
    for first in range(0, DV, BV):
        values = first + tl.arange(0, BV)
        value = tile(v, row, head, tokens, valid, values, DV)
        grad = tile(do, row, head, tokens, valid, values, DV)
        state = state_tile(states, index, head, heads, keys, values, DK, DV)
        met = tl.dot(grad, tl.trans(value), met, input_precision=PRECISION)
        dquery = tl.dot(grad, tl.trans(state), dquery, input_precision=PRECISION)
        if grads is not None:
            dstate = state_tile(grads, index, head, heads, keys, values, DK, DV)
            dkey = tl.dot(value, tl.trans(dstate), dkey, input_precision=PRECISION)
            kept += tl.sum(state * dstate, 1)
    if STRICT:
        met = tl.where(lower(C), met, 0.0)
    query = tile(q, row, head, tokens, valid, keys, DK) * scale
    key = tile(k, row, head, tokens, valid, keys, DK)
    if g is None:
        met = tl.where(since(C), met, 0.0)
        dquery = tl.dot(met, key, dquery, input_precision=PRECISION)
        dkey = tl.dot(tl.trans(met), query, dkey, input_precision=PRECISION)
    else:
        high, low = gates(g, row, head, tokens, valid, keys, DK, NORMALIZER)
        dquery *= factors(since(C), high, low)
        dkey *= factors(until(C), high, low)
        dgate = back(since(C), query * dquery, PRECISION) + back(until(C), key * dkey, PRECISION)
        dgate += (kept * total(high, low))[None, :]
        itself = tl.sum(tl.where(diagonal(C), met, 0.0), 1)[:, None]
        dquery += itself * key
        dkey += itself * query
        met = tl.where(lower(C), met, tl.trans(met))
        i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        for level in range(LEVELS):
            picks = meeting(level, i, t)
            decay = factors(picks, high, low)
            later = right(level, i)
            x = tl.where(later, query, key)
            pairs = tl.where(opposite(level, i, t), met, 0.0)
            dx = tl.dot(pairs, x * decay, input_precision=PRECISION) * decay
            dquery += tl.where(later, dx, 0.0)
            dkey += tl.where(later, 0.0, dx)
            dgate += back(picks, x * dx, PRECISION)
        if NORMALIZER is not None:
            logit = tile(g, row, head, tokens, valid, keys, DK)
            dgate *= 1.0 / ((1.0 + tl.exp(logit)) * NORMALIZER)
        if PER_HEAD:
            one = tl.arange(0, 1)
            put(dg, row, head, tokens, valid, tl.program_id(2) + one, tl.sum(dgate, 1)[:, None], DK)
        else:
            put(dg, row, head, tokens, valid, keys, dgate, DK)
    put(dq, row, head, tokens, valid, keys, dquery * scale, DK)
    put(dk, row, head, tokens, valid, keys, dkey, DK)
