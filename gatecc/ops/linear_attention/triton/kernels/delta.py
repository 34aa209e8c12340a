"""The states between chunks under the delta rules, where each chunk reads the state before it writes."""

from __future__ import annotations

import triton
import triton.language as tl

from gatecc.ops.linear_attention.triton.kernels.blocks import (
    chunk,
    column,
    put,
    put_state,
    state_tile,
    tile,
)
from gatecc.ops.linear_attention.triton.kernels.corrections import square


@triton.jit
def gates_of(kept, index, head, heads, keys, DK: tl.constexpr):
    """All gates of a chunk, (BK,), from (chunks, H, Dk)."""
    return tl.load(kept + (index * heads + head) * DK + keys, mask=keys < DK, other=0.0)


@triton.jit
def delta_scan(
    reads,
    writes,
    kept,
    v,
    beta,
    e,
    start,
    states,
    final,
    inverses,
    chunks,
    sequences,
    heads,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """e, what was found missing, and the states before each chunk; a block holds every key, BK >= Dk."""
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // heads, program % heads
    keys = tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    state = tl.zeros((BK, BV), tl.float32)
    if start is not None:
        state = state_tile(start, sequence, head, heads, keys, values, DK, DV)
    first, count = tl.load(sequences + sequence * 2), tl.load(sequences + sequence * 2 + 1)
    for n in range(count):
        index = first + n
        put_state(states, index, head, heads, keys, values, state, DK, DV)
        row, tokens, valid = chunk(chunks, index, C, REVERSE)
        missing = tile(v, row, head, tokens, valid, values, DV)
        read = tile(reads, row, head, tokens, valid, keys, DK)
        missing -= tl.dot(read, state, input_precision=PRECISION)
        missing = tl.dot(tl.load(inverses + square(index, head, heads, C)), missing, input_precision=PRECISION)
        put(e, row, head, tokens, valid, values, missing, DV)
        written = missing * column(beta, row, head, tokens, valid)[:, None]
        if kept is not None:
            state *= gates_of(kept, index, head, heads, keys, DK)[:, None]
        write = tile(writes, row, head, tokens, valid, keys, DK)
        state = tl.dot(tl.trans(write), written, state, input_precision=PRECISION)
    put_state(final, sequence, head, heads, keys, values, state, DK, DV)


@triton.jit
def delta_scan_backward(
    asks,
    reads,
    writes,
    kept,
    beta,
    do,
    du,
    de,
    start,
    grads,
    final,
    inverses,
    chunks,
    sequences,
    heads,
    scale,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of e, of u and of the states after each chunk. ``du`` comes with what the outputs of its chunk give."""
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // heads, program % heads
    keys = tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    state = state_tile(start, sequence, head, heads, keys, values, DK, DV)
    first, count = tl.load(sequences + sequence * 2), tl.load(sequences + sequence * 2 + 1)
    for n in range(count):
        index = first + count - 1 - n
        put_state(grads, index, head, heads, keys, values, state, DK, DV)
        row, tokens, valid = chunk(chunks, index, C, REVERSE)
        written = tile(du, row, head, tokens, valid, values, DV)
        write = tile(writes, row, head, tokens, valid, keys, DK)
        written = tl.dot(write, state, written, input_precision=PRECISION)
        put(du, row, head, tokens, valid, values, written, DV)
        missing = written * column(beta, row, head, tokens, valid)[:, None]
        inverse = tl.load(inverses + square(index, head, heads, C))
        missing = tl.dot(tl.trans(inverse), missing, input_precision=PRECISION)
        put(de, row, head, tokens, valid, values, missing, DV)
        query = tile(asks, row, head, tokens, valid, keys, DK) * scale
        if kept is not None:
            state *= gates_of(kept, index, head, heads, keys, DK)[:, None]
        grad = tile(do, row, head, tokens, valid, values, DV)
        state = tl.dot(tl.trans(query), grad, state, input_precision=PRECISION)
        read = tile(reads, row, head, tokens, valid, keys, DK)
        state -= tl.dot(tl.trans(read), missing, input_precision=PRECISION)
    put_state(final, sequence, head, heads, keys, values, state, DK, DV)
