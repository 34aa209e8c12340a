"""Numbers that launchers count with."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """How many blocks of b cover a."""
    return -(-a // b)


def block_of(width: int, most: int = 1 << 30) -> int:
    """A block that covers a width: a power of two, 16 at least, as tensor cores ask for, and ``most`` at most."""
    return min(most, max(16, 1 << (width - 1).bit_length()))
