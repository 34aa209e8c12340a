"""functions: what tl lacks or does not do well, for generated kernels. Blocks of rows and columns in float32.

tl's sine comes from libdevice, whose path for large arguments takes float64 and local memory in every kernel; tanh,
expm1 and log1p are not in tl, and what it has cancels near 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Near 0 a series, elsewhere by exp of what is negative."""
    square = x * x
    near = x * (1.0 - square * (0.3333333333 - square * (0.1333333333 - 0.05396825397 * square)))
    small = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0.0, -1.0, 1.0) * (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(x) < 0.1, near, far)


@triton.jit
def expm1(x):
    """exp(x) - 1, near 0 mended by what rounding made of the sum (Kahan)."""
    y = tl.exp(x)
    near = tl.where(y == 1.0, x, (y - 1.0) * x / tl.log(y))
    return tl.where(tl.abs(x) < 0.5, near, y - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), near 0 mended likewise."""
    y = 1.0 + x
    near = tl.where(y == 1.0, x, tl.log(y) * x / (y - 1.0))
    return tl.where(tl.abs(x) < 0.5, near, tl.log(y))


@triton.jit
def sine(x):
    """To an ulp or so, of any argument."""
    turns, rest = quarters(x)
    return wave(turns, rest)


@triton.jit
def cosine(x):
    """Likewise."""
    turns, rest = quarters(x)
    return wave(turns + 1, rest)


@triton.jit
def wave(turns, x):
    """The sine of x plus so many quarter turns; x: at most an eighth of a turn (Moshier, Cephes)."""
    z = x * x
    odd = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    even = 1.0 - 0.5 * z + z * z * (4.166664568e-2 + z * (-1.388731625e-3 + z * 2.443315712e-5))
    found = tl.where((turns & 1) == 1, even, odd)
    return tl.where((turns & 2) == 2, -found, found)


@triton.jit
def quarters(x):
    """Quarter turns in x, modulo 4, and what is left of it."""
    x = x + tl.zeros((1, 1), tl.float32)
    count = tl.floor(x * 0.6366197723675814 + 0.5)
    # pi / 2 in parts of 11 bits: what up to 2 ** 13 of them take off x is exact (Cody and Waite).
    rest = x - count * 1.5703125
    rest = rest - count * 0.0004837512969970703
    rest = rest - count * 7.549533620476723e-08
    rest = rest - count * 2.563344151594519e-12
    turns = count.to(tl.int32) & 3
    largest: tl.tensor = tl.max(tl.max(tl.abs(x), 1), 0)  # pyright: ignore[reportAssignmentType]
    if largest >= 8192.0:
        more, left = far_quarters(x)
        far = tl.abs(x) >= 8192.0
        turns, rest = tl.where(far, more, turns), tl.where(far, left, rest)
    return turns, rest


@triton.jit
def far_quarters(x):
    """``quarters`` of a large x: its 24 bits times those bits of 2 / pi that matter to it (Payne and Hanek)."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    mantissa = (((bits & 0x7FFFFF) | 0x800000) << 8).to(tl.uint32, bitcast=True).to(tl.uint64)
    place = (bits >> 23) - 128
    index, shift = place >> 5, (place & 31).to(tl.uint64)
    product = (mantissa * part(index, shift)) << 32
    product += mantissa * part(index + 1, shift)
    product += (mantissa * part(index + 2, shift)) >> 32
    turns = (product + 0x2000000000000000) >> 62
    rest = (product - (turns << 62)).to(tl.int64, bitcast=True).to(tl.float32) * 3.4061215800865545e-19
    turns = turns.to(tl.int32) & 3
    return tl.where(x < 0, (4 - turns) & 3, turns), tl.where(x < 0, -rest, rest) + (x - x)


@triton.jit
def part(index, shift):
    """32 bits of 2 / pi, ``shift`` bits into a word."""
    return (((word(index) << 32) | word(index + 1)) >> (32 - shift)) & 0xFFFFFFFF


@triton.jit
def word(index):
    """A word of the bits of 2 / pi, of which the first is the second here."""
    found = tl.where(index == 1, 0xA2F9836E, 0)
    found = tl.where(index == 2, 0x4E441529, found)
    found = tl.where(index == 3, 0xFC2757D1, found)
    found = tl.where(index == 4, 0xF534DDC0, found)
    found = tl.where(index == 5, 0xDB629599, found)
    return tl.where(index == 6, 0x3C439041, found).to(tl.uint64)
