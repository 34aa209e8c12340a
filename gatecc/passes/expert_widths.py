"""Other widths for a proof: wide experts are tried as narrow ones, which costs a fraction of the time and memory."""

from __future__ import annotations

from math import prod

from torch import fx

from gatecc.ir.program import shape
from gatecc.ir.sizes import Size, expression, on_example
from gatecc.passes.expert_matrices import Matrices

WIDE = 48  # widths beyond it are tried as smaller ones
_TRIED = (24, 40)  # in their place: of the tokens, and inside the experts


def narrow(held: Matrices, x: fx.Node, indices: fx.Node) -> dict[int, int]:
    """Smaller sizes by the widths that stand in the graph: of the tokens, of the experts, twice that with a gate.

    Those that are equal stay equal. None if a number of tokens, choices or experts is the same number and stands in
    the graph, too: one that is free in every call is no number there.
    """
    width, hidden = on_example(shape(x)[-1]) or 0, held.hidden
    inner = 2 * hidden if held.gated else hidden
    if held.width != width or sorted(held.down.shape) != sorted((width, hidden)):
        return {}  # experts that change the width of the tokens
    if not fixed(shape(x)[-1]) or {width, hidden, inner} & _taken(held, x, indices):
        return {}
    tokens, inside = _TRIED
    if width == inner:
        tokens = inside * (inner // hidden)
    if width == hidden:
        inside = tokens
    sizes = {width: tokens} if width > WIDE or width in (hidden, inner) else {}
    if hidden > WIDE or width in (hidden, inner):
        sizes |= {hidden: inside, inner: inside * (inner // hidden)}
    return sizes if max(width, hidden) > WIDE else {}


def _taken(held: Matrices, x: fx.Node, indices: fx.Node) -> set[int]:
    """Numbers of something else than features."""
    rows = shape(indices)
    numbers = [on_example(size) or 1 for size in (*shape(x)[:-1], *rows) if fixed(size)]
    numbers += [prod(on_example(size) or 1 for size in sizes) for sizes in (rows, rows[:-1]) if all(map(fixed, sizes))]
    return {*numbers, held.experts, held.experts + 1}


def fixed(size: Size) -> bool:
    """Whether a size is the same in every call."""
    return bool(expression(size).is_Integer)


__all__ = ["WIDE", "fixed", "narrow"]
