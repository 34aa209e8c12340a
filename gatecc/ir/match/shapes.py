"""Shapes: when two values have the same shape, as far as a matcher must know."""

from __future__ import annotations

from torch import fx

from gatecc.ir.program import fake
from gatecc.ir.sizes import Size, on_example, same


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values have the same shape on the example inputs.

    That it holds for all inputs often cannot be proved (windows that are padded and cropped back), and need not be:
    a size that changes shows on the example.
    """
    left, right = fake(one), fake(other)
    if left is None or right is None or left.dim() != right.dim():
        return False
    return all(map(_agree, left.shape, right.shape))


def _agree(one: Size, other: Size) -> bool:
    return same(one, other) or on_example(one) == on_example(other)
