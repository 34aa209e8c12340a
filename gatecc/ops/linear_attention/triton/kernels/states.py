"""The states between chunks, and backward their gradients: the only part that goes through a sequence in order."""

from __future__ import annotations

import triton
import triton.language as tl

from gatecc.ops.linear_attention.triton.kernels.blocks import (
    chunk,
    factors,
    gates,
    put_state,
    since,
    state_tile,
    tile,
    total,
    until,
)


@triton.jit
def scan(
    x,
    y,
    g,
    start,
    states,
    final,
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
    BACKWARD: tl.constexpr,
    NORMALIZER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S <- (all gates of the chunk) S + (x, decayed)^T y, for each sequence, head and block of the state.

    Forward x is k and y is v, each decayed up to the end of the chunk; ``states`` are those before each chunk. Backward
    x is q and y the gradient of o, decayed down to the start, from the last chunk to the first; ``states`` are the
    gradients of the state after each chunk. ``start`` and ``final``: (S, H, Dk, Dv).
    """
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // heads, program % heads
    keys = tl.program_id(1) * BK + tl.arange(0, BK)
    values = tl.program_id(2) * BV + tl.arange(0, BV)
    state = tl.zeros((BK, BV), tl.float32)
    if start is not None:
        state = state_tile(start, sequence, head, heads, keys, values, DK, DV)
    first, count = tl.load(sequences + sequence * 2), tl.load(sequences + sequence * 2 + 1)
    for n in range(count):
        index = first + count - 1 - n if BACKWARD else first + n
        put_state(states, index, head, heads, keys, values, state, DK, DV)
        row, tokens, valid = chunk(chunks, index, C, REVERSE)
        written = tile(x, row, head, tokens, valid, keys, DK) * scale
        value = tile(y, row, head, tokens, valid, values, DV)
        if g is not None:
            high, low = gates(g, row, head, tokens, valid, keys, DK, NORMALIZER)
            written *= factors(since(C) if BACKWARD else until(C), high, low)
            state *= total(high, low)[:, None]
        state = tl.dot(tl.trans(written), value, state, input_precision=PRECISION)
    put_state(final, sequence, head, heads, keys, values, state, DK, DV)
