"""One token of every head: what decoding runs."""

from __future__ import annotations

import triton
import triton.language as tl

from gatecc.ops.linear_attention.triton.kernels.blocks import activated, put_state, state_tile


@triton.jit
def channels_of(x, row, head, channels, WIDTH: tl.constexpr):
    """Channels of the one token of a head in float32, zero beyond the last."""
    place = x.at + row * x.row + (head // x.group) * x.head + channels.to(tl.int64) * x.channel
    return tl.load(place, mask=channels < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def token(
    q,
    k,
    v,
    g,
    beta,
    state,
    after,
    o,
    heads,
    scale,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZER: tl.constexpr,
):
    """S <- diag(e^g) S + k u^T and o = scale S^T q, for each row, head and block of values.

    u is v, or for the delta rules beta (v - (diag(e^g) S)^T k). A program has all keys, so it reads and writes its part
    of the state once; ``after`` may be ``state``.
    """
    program = tl.program_id(0).to(tl.int64)
    row, head = program // heads, program % heads
    keys, values = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    held = state_tile(state, row, head, heads, keys, values, DK, DV)
    key, written = channels_of(k, row, head, keys, DK), channels_of(v, row, head, values, DV)
    if g is not None:
        held *= tl.exp(activated(channels_of(g, row, head, keys, DK), NORMALIZER))[:, None]
    if beta is not None:
        strength = tl.load(beta.at + row * beta.row + (head // beta.group) * beta.head).to(tl.float32)
        written = (written - tl.sum(held * key[:, None], 0)) * strength
    held += key[:, None] * written[None, :]
    put_state(after, row, head, heads, keys, values, held, DK, DV)
    found = tl.sum(held * channels_of(q, row, head, keys, DK)[:, None], 0) * scale
    place = o.at + row * o.row + head * o.head + values.to(tl.int64) * o.channel
    tl.store(place, found.to(o.at.dtype.element_ty), mask=values < DV)
