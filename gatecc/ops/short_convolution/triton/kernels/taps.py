"""A causal convolution of K taps along tokens, each channel by itself, forward and backward, for many tokens and one.

A program takes TOKENS tokens of CHANNELS channels, which lie together. A tap reads the tile of its own tokens: all but
the first find it in the cache. Numbers are multiplied and added in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(x, sample, tokens, channels, inside, C):
    """(TOKENS, CHANNELS) of x in float32, zero where a token is not ``inside``."""
    place = x.at + sample * x.sample + tokens.to(tl.int64)[:, None] * x.token + channels[None, :]
    mask = inside[:, None] & (channels < C)[None, :]
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def inputs(x, state, sample, tokens, channels, N, C, K: tl.constexpr):
    """The inputs of tokens, as they lie: before the first those of the state, zeros without one."""
    found = tile(x, sample, tokens, channels, (tokens >= 0) & (tokens < N), C)
    if state is not None:
        before = tile(state, sample, tokens + (K - 1), channels, (tokens < 0) & (tokens > -K), C)
        found = tl.where((tokens < 0)[:, None], before, found)
    return found


@triton.jit
def tap(weight, j, channels, C, K: tl.constexpr):
    """Weight j of each channel in float32. weight: (C, K), contiguous."""
    return tl.load(weight + channels * K + j, mask=channels < C, other=0.0).to(tl.float32)


@triton.jit
def weighed(x, weight, bias, state, sample, tokens, channels, N, C, K: tl.constexpr):
    """The sums over taps, (TOKENS, CHANNELS) in float32."""
    found = tl.zeros((tokens.shape[0], channels.shape[0]), tl.float32)
    if bias is not None:
        found += tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
        seen = inputs(x, state, sample, tokens - (K - 1) + j, channels, N, C, K)
        found += tap(weight, j, channels, C, K)[None, :] * seen.to(tl.float32)
    return found


@triton.jit
def put(x, sample, tokens, channels, found, inside, C):
    """Store a tile."""
    place = x.at + sample * x.sample + tokens.to(tl.int64)[:, None] * x.token + channels[None, :]
    mask = inside[:, None] & (channels < C)[None, :]
    tl.store(place, found.to(x.at.dtype.element_ty), mask=mask)


@triton.jit
def convolve(
    x,
    weight,
    bias,
    state,
    y,
    after,
    blocks,
    N,
    C,
    K: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """y_t = act(bias + the sum over j of weight_j x_(t - K + 1 + j)), and the last K - 1 inputs into ``after``.

    KEPT: K - 1, rounded up to a power of two.
    """
    program = tl.program_id(0).to(tl.int64)
    sample, block = program // blocks, program % blocks
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tokens = (block * TOKENS).to(tl.int32) + tl.arange(0, TOKENS)
    found = weighed(x, weight, bias, state, sample, tokens, channels, N, C, K)
    if SILU:
        found = found * tl.sigmoid(found)
    put(y, sample, tokens, channels, found, tokens < N, C)
    if block == blocks - 1:
        kept = tl.arange(0, KEPT)
        last = inputs(x, state, sample, tl.where(kept < K - 1, N - (K - 1) + kept, N), channels, N, C, K)
        put(after, sample, kept, channels, last, kept < K - 1, C)


@triton.jit
def differentiate(
    x,
    weight,
    bias,
    state,
    grad,
    dz,
    sums,
    blocks,
    N,
    C,
    K: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dz = dy act'(z), where z is computed again, and the sums over a program's tokens of dz_t x_(t - K + 1 + j), for
    each j, and of dz: (programs, K + 1, C) in float32. ``dz`` and ``sums`` may be None.
    """
    program = tl.program_id(0).to(tl.int64)
    sample, block = program // blocks, program % blocks
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tokens = (block * TOKENS).to(tl.int32) + tl.arange(0, TOKENS)
    found = tile(grad, sample, tokens, channels, tokens < N, C).to(tl.float32)
    if SILU:
        z = weighed(x, weight, bias, state, sample, tokens, channels, N, C, K)
        s = tl.sigmoid(z)
        found *= s * (1.0 + z * (1.0 - s))
    if dz is not None:
        put(dz, sample, tokens, channels, found, tokens < N, C)
    if sums is not None:
        place = sums + program * (K + 1) * C + channels
        for j in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
            seen = inputs(x, state, sample, tokens - (K - 1) + j, channels, N, C, K)
            tl.store(place + j * C, tl.sum(found * seen.to(tl.float32), 0), mask=channels < C)
        tl.store(place + K * C, tl.sum(found, 0), mask=channels < C)


@triton.jit
def spread(
    dz,
    weight,
    dx,
    dstate,
    blocks,
    first,
    N,
    C,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dx_s = the sum over j of weight_j dz_(s + K - 1 - j), from token ``first`` on; before 0 it is ``dstate``'s.

    ``dx`` and ``dstate`` may be None.
    """
    program = tl.program_id(0).to(tl.int64)
    sample, block = program // blocks, program % blocks
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tokens = first + (block * TOKENS).to(tl.int32) + tl.arange(0, TOKENS)
    found = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for j in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
        at = tokens + (K - 1) - j
        reached = tile(dz, sample, at, channels, (at >= 0) & (at < N), C)
        found += tap(weight, j, channels, C, K)[None, :] * reached.to(tl.float32)
    if dx is not None:
        put(dx, sample, tokens, channels, found, (tokens >= 0) & (tokens < N), C)
    if dstate is not None:
        put(dstate, sample, tokens + (K - 1), channels, found, tokens < 0, C)
