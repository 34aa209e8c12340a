"""Narrow sizes for a proof: axes along which a part of a graph treats every place alike are tried shorter.

Heads and features are such axes where they only take part in element-wise operations, products and sums: no place of
them is selected, counted, compared with a position. What holds for a few of them holds for all. The axes of tokens are
none: a loop that was unrolled selects each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import sympy
import torch
from torch import fx

from gatecc.ir.ops import opname
from gatecc.ir.program import shape
from gatecc.ir.sizes import on_example, value
from gatecc.passes.causal.axes import Axes, Axis, rank, size

_SIZED = "new_zeros new_ones new_full expand view reshape _unsafe_view".split()
# The place of the sizes among the arguments.
_SIZES: dict[str, int] = {**dict.fromkeys(("zeros", "ones", "full"), 0), **dict.fromkeys(_SIZED, 1)}
_TRIED = (2, 4, 5, 6, 7, 9)  # different ones, so that axes are not taken for each other


class Narrow:
    """The sizes with which some nodes are tried. ``nodes``: in order; ``whole``: axes that keep their sizes;
    ``symbols``: free sizes that are others than those of the example."""

    def __init__(
        self, nodes: Sequence[fx.Node], whole: Iterable[Axis], symbols: Mapping[sympy.Symbol, int] | None = None
    ) -> None:
        self.symbols = symbols or {}
        self._axes = Axes()
        kept = {axis for node in nodes for axis in self._axes.visit(node)}
        kept |= {*whole} | {axis for node in nodes for axis in _free(node)}
        roots = {self._axes.root(axis) for axis in kept}
        free = [root for root in self._axes.roots() if root not in roots and size(root) > _TRIED[0]]
        self._tried = {axis: min(tried, size(axis)) for axis, tried in zip(free, _TRIED, strict=False)}

    def __bool__(self) -> bool:
        """Whether anything is tried shorter."""
        return any(tried < size(axis) for axis, tried in self._tried.items())

    def sizes(self, node: fx.Node) -> list[int]:
        """Of what a node holds. Raises UnknownSizeError."""
        found = [self._tried.get(self._axes.root((node, at))) for at in range(rank(node))]
        return [self._whole(x) if tried is None else tried for x, tried in zip(shape(node), found, strict=True)]

    def argument(self, node: fx.Node) -> tuple[int, list[int]] | None:
        """The place of the argument that holds the sizes of a node's result, and what they are; None without one."""
        place = _SIZES.get(opname(node)) if node.op == "call_function" and (self._tried or self.symbols) else None
        if place is None or len(node.args) <= place or not isinstance(node.args[place], list | tuple):
            return None
        return place, self.sizes(node)

    def _whole(self, held: int | torch.SymInt) -> int:
        return int(value(held, self.symbols)) if self.symbols else on_example(held) or 1


def _free(node: fx.Node) -> list[Axis]:
    """Axes of a node whose size is not a number."""
    return [(node, at) for at in range(rank(node)) if type(shape(node)[at]) is not int]
