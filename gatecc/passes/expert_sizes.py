"""Other sizes for a dispatch whose sizes are free: what holds on the example must hold there too.

A capacity that counts tokens (8 + N // 2), a scale by their number, or a slice shows at a second length alone: one
beyond every number in the graph that may count tokens, and the least that the graph runs at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import prod

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from gatecc.ir.ops import opname
from gatecc.ir.program import Program, fake, shape
from gatecc.ir.sizes import Size, Sizes, UnknownSizeError, example_sizes, expression, on_example, symbols, value
from gatecc.passes.causal.lengths import allowed, pinned

_LONGEST = 4096  # tokens of a second size
_ALL = 2**31  # where slices that go to the end say so
_TRIED = 8  # sizes that are tried one after the other
_COUNTED = frozenset("lt le gt ge eq ne clamp clamp_min clamp_max minimum maximum where arange sub remainder".split())


def other_sizes(program: Program, nodes: Sequence[fx.Node], x: fx.Node, widths: set[int]) -> list[Sizes] | str:
    """Numbers for the free sizes, others than on the example; none if no size is free; else why they are not known.

    ``nodes``: what stands between the tokens ``x`` (..., d) and their sum. ``widths``: sizes that tokens must not have,
    so that experts can be tried as narrow ones.
    """
    rows = shape(x)[:-1]
    held = [size for n in (*nodes, x) for size in _sizes(n) if symbols(size)]
    example = example_sizes(program)
    free = {s for size in held for s in symbols(size) if s in example} - pinned(held)
    if not free:
        return []
    tokens = prod(on_example(size) or 1 for size in rows)
    largest = max((n for node in nodes for n in _counts(node) if n < _ALL), default=0.0)
    if largest >= _LONGEST:
        return f"the number of tokens is free, and {largest:g} in the graph may count more of them than a proof runs"
    found: list[Sizes] = []
    for kind in (_more(example, free, rows, max(4 * largest, min(4 * tokens, tokens + 512))), _fewer(example, free)):
        usable = (sizes for sizes in kind if sizes != example and _tokens(rows, sizes) not in {0, *widths})
        found += islice((sizes for sizes in usable if allowed(held, sizes)), 1)
    return found or f"its sizes are free, and none but those of the example ({tokens} tokens) can be tried"


def _more(example: Sizes, free: set[sympy.Symbol], rows: Sequence[Size], least: float) -> Iterator[Sizes]:
    """One of the sizes that count tokens grows until there are enough; the others by one, which tells them apart."""
    counting = [s for s in free if any(s in symbols(size) for size in rows)]
    for grown in sorted(counting, key=lambda s: -example[s]):
        for more in (1, 0):
            others = {s: on + more * (s in free) for s, on in example.items()}
            each = max(_tokens(rows, {**others, grown: 64}) // 64, 1)
            start = min(int(least), _LONGEST) // each + 1
            yield from ({**others, grown: max(start, example[grown] + 1) + i} for i in range(_TRIED))
            yield from ({**others, grown: example[grown] * (start // example[grown] + 1 + i)} for i in range(_TRIED))


def _fewer(example: Sizes, free: set[sympy.Symbol]) -> Iterator[Sizes]:
    yield from ({s: min(least, on) if s in free else on for s, on in example.items()} for least in (2, 3, 4))


def _tokens(rows: Sequence[Size], sizes: Sizes) -> int:
    """How many there are; 0 if the data say so."""
    try:
        return prod(int(value(size, sizes)) for size in rows)
    except UnknownSizeError:
        return 0


def _counts(node: fx.Node) -> Iterator[float]:
    """Numbers that may count tokens: of comparisons and slices along free sizes, and in sums of sizes."""
    if node.op != "call_function":
        return
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    whole = [fake(n) for n in node.all_input_nodes]
    if opname(node) in _COUNTED and not any(x is not None and x.is_floating_point() for x in whole):
        yield from (float(x) for x in leaves if type(x) in (int, float))
    if opname(node) in ("slice", "narrow") and any(symbols(x) for n in node.all_input_nodes for x in _sizes(n)):
        dim = node.args[1] if len(node.args) > 1 else 0
        if isinstance(dim, int) and symbols(shape(node.all_input_nodes[0])[dim]):
            yield from (float(abs(x)) for x in node.args[2:] if type(x) is int)
    for size in _sizes(node):
        if symbols(size):
            sums = expression(size).atoms(sympy.Add, sympy.Max, sympy.Min)
            yield from (abs(float(x)) for term in sums for x in term.atoms(sympy.Number))


def _sizes(node: fx.Node) -> list[int | torch.SymInt]:
    held = node.meta.get("val")
    if isinstance(held, torch.SymInt | torch.SymFloat | torch.SymBool):
        return [held]  # pyright: ignore[reportReturnType]  a number of any kind
    return list(shape(node)) if fake(node) is not None else []
