"""Small kernels with a fault each, and some without."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(x: tl.tensor, y: tl.tensor, out: tl.tensor, scale: tl.tensor, WIDE: tl.constexpr, N: tl.constexpr) -> None:
    """out = scale x y of N x N, with sums of its rows in float64 if WIDE."""
    at = tl.expand_dims(tl.arange(0, N), 1) * N + tl.expand_dims(tl.arange(0, N), 0)
    z = tl.dot(tl.load(x + at), tl.load(y + at)) * scale
    if WIDE:
        z += tl.expand_dims(tl.sum(z.to(tl.float64), 1), 1).to(tl.float32)
    tl.store(out + at, z)


@triton.jit
def copied(
    x: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr, MASKED: tl.constexpr, STEP: tl.constexpr
) -> None:
    """out = x by blocks that begin STEP apart."""
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    mask = at < (count if MASKED else 10 * BLOCK)
    tl.store(out + at, tl.load(x + at, mask=mask), mask=mask)


@triton.jit
def halves(x: tl.tensor, y: tl.tensor, out: tl.tensor, N: tl.constexpr) -> None:
    """out = x y and x y + x, element by element, and as a product of N x N: all in bfloat16."""
    at = tl.expand_dims(tl.arange(0, N), 1) * N + tl.expand_dims(tl.arange(0, N), 0)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a * b)
    tl.store(out + N * N + at, (a.to(tl.float32) * b + a).to(tl.bfloat16))
    tl.store(out + 2 * N * N + at, tl.dot(a, b).to(tl.bfloat16))


@triton.jit
def shifted(x: tl.tensor, BLOCK: tl.constexpr) -> None:
    """x moves by one, in place, by blocks: a program reads what its neighbour writes."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at + 1))


@triton.jit
def held(x: tl.tensor, out: tl.tensor, N: tl.constexpr) -> None:
    """out = x of N x N, three times over the sum of its exp: all of it is held."""
    at = tl.expand_dims(tl.arange(0, N), 1) * N + tl.expand_dims(tl.arange(0, N), 0)
    found = tl.load(x + at)
    for _ in range(3):
        found = found / tl.sum(tl.exp(found))
    tl.store(out + at, found)
