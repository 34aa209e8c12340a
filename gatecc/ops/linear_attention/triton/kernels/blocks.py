"""What the kernels of linear attention share: how a chunk is read, and how its decays become matrices.

A chunk of C tokens is halved again and again. At each level the tokens of a right half meet those of the left half
beside it, at the boundary between them: q_i carries the gates from the boundary to i, k_j those from after j to the
boundary. Both are sums of log decays over tokens that lie between, so no exponent is a difference of two long sums:
nothing overflows, nothing cancels, and a gate of 0 is exact. The sums are products with a 0-1 matrix, whose transpose
brings the gradient of the exponents back to the log decays (Yang et al. 2024, GLA, has the chunk; the halving is ours).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def offsets(x, row, head, tokens, channels):
    """Where the channels of some tokens lie in an operand: (tokens, channels)."""
    base = row * x.row + (head // x.group) * x.head
    return base + tokens[:, None] * x.token + channels[None, :].to(tl.int64) * x.channel


@triton.jit
def tile(x, row, head, tokens, valid, channels, WIDTH: tl.constexpr):
    """Channels of some tokens in float32, zero where there is no token or no channel: (tokens, channels)."""
    inside = valid[:, None] & (channels < WIDTH)[None, :]
    return tl.load(x.at + offsets(x, row, head, tokens, channels), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def put(x, row, head, tokens, valid, channels, value, WIDTH: tl.constexpr):
    """Write channels of some tokens."""
    inside = valid[:, None] & (channels < WIDTH)[None, :]
    tl.store(x.at + offsets(x, row, head, tokens, channels), value.to(x.at.dtype.element_ty), mask=inside)


@triton.jit
def column(x, row, head, tokens, valid):
    """The one channel of some tokens in float32, zero where there is no token: (tokens,)."""
    base = x.at + row * x.row + (head // x.group) * x.head
    return tl.load(base + tokens * x.token, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def state_offsets(index, head, heads, keys, values, DK: tl.constexpr, DV: tl.constexpr):
    """Where a block of state lies in a contiguous (index, H, Dk, Dv)."""
    return (index * heads + head) * DK * DV + keys[:, None] * DV + values[None, :]


@triton.jit
def state_tile(x, index, head, heads, keys, values, DK: tl.constexpr, DV: tl.constexpr):
    """A block of state, zero beyond its edges: (keys, values)."""
    inside = (keys < DK)[:, None] & (values < DV)[None, :]
    return tl.load(x + state_offsets(index, head, heads, keys, values, DK, DV), mask=inside, other=0.0)


@triton.jit
def put_state(x, index, head, heads, keys, values, value, DK: tl.constexpr, DV: tl.constexpr):
    """Write a block of state."""
    inside = (keys < DK)[:, None] & (values < DV)[None, :]
    tl.store(x + state_offsets(index, head, heads, keys, values, DK, DV), value, mask=inside)


@triton.jit
def chunk(chunks, index, C: tl.constexpr, REVERSE: tl.constexpr):
    """Row of the batch, the tokens in the order in which the recurrence meets them, and which of them exist."""
    entry = chunks + index * 3
    row, first, count = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    step = tl.arange(0, C)
    tokens = first - step if REVERSE else first + step
    return row, tokens, step < count


@triton.jit
def activated(x, NORMALIZER: tl.constexpr):
    """The log decay from what was given: itself, or logsigmoid(x) / NORMALIZER of a logit."""
    if NORMALIZER is not None:
        x = (tl.where(x < 0, x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))) / NORMALIZER
    return x


@triton.jit
def gates(g, row, head, tokens, valid, channels, WIDTH: tl.constexpr, NORMALIZER: tl.constexpr):
    """Log decays as two float16 parts whose sum is exact to 2^-22: what a tensor core sums without loss. (C, BK).

    A token that does not exist keeps everything: 0. e^-128 is 0 in float32, so no decay is stronger.
    """
    inside = valid[:, None] & (channels < WIDTH)[None, :]
    x = tl.where(inside, activated(tile(g, row, head, tokens, valid, channels, WIDTH), NORMALIZER), 0.0)
    x = tl.where(x < -128.0, -128.0, x)
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def factors(mask, high, low):
    """exp of sums of log decays: row i takes the tokens t for which mask[i, t] holds. (C, BK)."""
    pick = tl.where(mask, 1.0, 0.0).to(tl.float16)
    return tl.exp(tl.dot(pick, high, tl.dot(pick, low)))


@triton.jit
def total(high, low):
    """exp of the sum of all log decays of a chunk: (BK,)."""
    return tl.exp(tl.sum(high.to(tl.float32) + low.to(tl.float32), 0))


@triton.jit
def back(mask, z, PRECISION: tl.constexpr):
    """The gradient of log decays from that of the exponents of ``factors``: (C, BK)."""
    pick = tl.where(mask, 1.0, 0.0)
    return tl.dot(tl.trans(pick), z, input_precision=PRECISION)


@triton.jit
def since(C: tl.constexpr):
    """Of ``factors``: from the start of the chunk up to a token, its own gate included. What a query carries."""
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return t <= i


@triton.jit
def until(C: tl.constexpr):
    """Of ``factors``: from after a token to the end of the chunk. What a key carries."""
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return t > i


@triton.jit
def meeting(level, i, t):
    """Of ``factors``: between token i and the boundary of its pair of halves, of 2 ** level tokens each."""
    here = i >> level
    return (here == (t >> level)) & (((here & 1) == 1) == (t <= i))


@triton.jit
def right(level, i):
    """Whether token i is in a right half."""
    return ((i >> level) & 1) == 1


@triton.jit
def opposite(level, i, t):
    """Whether two tokens are in the two halves of one pair."""
    return ((i >> level) ^ (t >> level)) == 1


@triton.jit
def lower(C: tl.constexpr):
    """Pairs (i, j) with j < i."""
    return tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]


@triton.jit
def diagonal(C: tl.constexpr):
    """Pairs (i, i)."""
    return tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :]


@triton.jit
def weights(q, k, high, low, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """q_i · k_j times the gates after j up to i, for j <= i; above the diagonal it means nothing. C = 2 ** LEVELS."""
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    found = tl.where(i == t, tl.sum(q * k, 1)[:, None], 0.0)
    for level in range(LEVELS):
        x = tl.where(right(level, i), q, k) * factors(meeting(level, i, t), high, low)
        found += tl.where(opposite(level, i, t), tl.dot(x, tl.trans(x), input_precision=PRECISION), 0.0)
    return found
