"""Other sizes for a part whose sizes are free: what holds on the example must hold there too.

A window that is longer than the example, or a scale that was computed from its length, shows at a second length alone.
It is chosen beyond every number in the graph that may count tokens, and within the guards under which the graph runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from gatecc.ir.program import Program, shape
from gatecc.ir.sizes import Sizes, UnknownSizeError, example_sizes, on_example, symbols, value
from gatecc.passes.causal.axes import rank
from gatecc.passes.causal.parts import Part

_LONGEST = 2048  # tokens of a second length
_USUAL = 1024  # tokens of one, unless numbers in the graph are larger
_NEAR = 64  # lengths that are tried one after the other: one of them is a multiple of the usual chunks
_ALL = 2**31  # where slices that go to the end say so


def other_sizes(program: Program, part: Part) -> Sizes | str:
    """A number for each free size, others than on the example; empty if no size of the part is free; else why not."""
    length = shape(part.out)[part.axis]
    held = [x for n in (*part.nodes, *part.operands) for x in _sizes(n) if symbols(x)]
    free = {s for x in held for s in symbols(x)}
    if not free:
        return {}
    tokens = on_example(length) or 1
    numbers = [x for n in part.nodes for x in pytree.tree_leaves((n.args, n.kwargs)) if type(x) in (int, float)]
    largest = max((abs(x) for x in numbers if tokens <= abs(x) < _ALL), default=0) if symbols(length) else 0
    if largest > _LONGEST:
        return f"the length is free, and {largest} in the graph may count more tokens than a proof runs"
    example = example_sizes(program)
    for tried, more in product(_lengths(tokens, int(largest)), (1, 2, 0)):
        sizes = {s: tried if s in symbols(length) else on + more * (s in free) for s, on in example.items()}
        try:
            differs = not symbols(length) or tokens != value(length, sizes) > largest
        except UnknownSizeError:
            continue
        if sizes != example and differs and allowed(held, sizes):
            return sizes
    return f"its sizes are free, and none but those of the example ({tokens} tokens) can be tried"


def _sizes(node: fx.Node) -> list[int | torch.SymInt]:
    held = node.meta.get("val")
    return [held] if isinstance(held, torch.SymInt) else list(shape(node)) if rank(node) else []


def _lengths(tokens: int, largest: int) -> Iterator[int]:
    """Odd ones first: what holds for whole chunks alone is told by them."""
    start = max(tokens, largest)
    start = max(min(4 * start, _USUAL), largest) + 2 if largest or tokens <= _USUAL // 2 else tokens // 2
    yield from range(start + 1, start + _NEAR + 1)
    yield from (2 * start, 3 * start, 4 * start)


def allowed(held: list[int | torch.SymInt], sizes: Sizes) -> bool:
    """Whether a graph that holds these free sizes runs at these sizes: each in its range, and all guards hold."""
    env = _environment(held)
    ranges = ((env.var_to_range.get(s), x) for s, x in sizes.items())
    if not all(bounds is None or bounds.lower <= x <= bounds.upper for bounds, x in ranges):
        return False
    given = {s: sympy.Integer(x) for s, x in sizes.items()}
    return not any(guard.expr.xreplace(given) == sympy.false for guard in env.guards)


def pinned(held: list[int | torch.SymInt]) -> set[sympy.Symbol]:
    """Free sizes that guards hold to one number: there, the graph is compiled anew for another one."""
    if not any(isinstance(x, torch.SymInt) for x in held):
        return set()
    sides = [guard.expr.args for guard in _environment(held).guards if isinstance(guard.expr, sympy.Eq)]
    held_to = (one for one, other in sides if other.is_number and isinstance(one, sympy.Expr) and one.is_polynomial())
    return {s for one in held_to for s in one.free_symbols if isinstance(s, sympy.Symbol)}


def _environment(held: list[int | torch.SymInt]) -> ShapeEnv:
    return next(x for x in held if isinstance(x, torch.SymInt)).node.shape_env  # pyright: ignore[reportReturnType]  symbols have one
