"""region_growth: which nodes of a graph are one region: products of matrices, what is before and what is behind them.

Behind a product are pointwise operators and reductions of its rows, and other products of its shape that meet it there:
among them those of low rank, which read a product of few columns. Before it are those that only it reads: a norm, a
gate. Nothing outside of a region lies between two of its nodes, and only its last node is read outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import networkx as nx
from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import argument, mutates, opname
from gatecc.ir.program import Program, fake
from gatecc.ops.generated import CASTS, POINTWISE, REDUCED, ROWWISE, WIDEST_MIDDLE, WIDEST_PRODUCT

_PRODUCTS = ("linear", "matmul", "mm", "addmm")
_MOST = 40  # nodes of a region: a norm that is spelled out has eight


@dataclass(frozen=True)
class Parts:
    """What a region may have besides products of one shape and pointwise operators behind them."""

    before: bool = True
    low_rank: bool = True
    reduced: bool = True


# From the whole region to what is left if that has no kernel, or one that takes longer than two.
_FEWER = (Parts(), Parts(before=False), Parts(False, low_rank=False), Parts(False, low_rank=False, reduced=False))


class Regions:
    """The regions of a program. ``taken``: the nodes of those that were chosen, which belong to no other."""

    def __init__(self, program: Program) -> None:
        self.whole: Any = nx.DiGraph((source, node) for node in program.calls() for source in node.all_input_nodes)
        self.flow = Flow(program)
        self.taken, self.offered = set[fx.Node](), set[frozenset[fx.Node]]()
        self.products = [n for n in program.calls() if is_product(n) and fake(n) is not None]
        self.low_rank = {n: self._low_rank(n) for n in self.products}
        self.readers = {first: n for n, few in self.low_rank.items() for first in few if is_product(first)}
        self.below: Any = cache(lambda node: nx.descendants(self.whole, node))
        self.above: Any = cache(lambda node: nx.ancestors(self.whole, node))

    def candidates(self, seed: fx.Node) -> Iterator[list[fx.Node]]:
        """The regions of a product in the order of the graph, the largest first, each once; none if it is alone."""
        for parts in _FEWER:
            start = self.readers.get(seed, seed) if parts.low_rank else seed
            members = frozenset[fx.Node]() if start in self.taken else frozenset(self._grown(start, parts))
            if len(members) > 1 and seed in members and members not in self.offered:
                self.offered.add(members)
                yield sorted(members, key=self.flow.order.__getitem__)

    def _grown(self, seed: fx.Node, parts: Parts) -> set[fx.Node]:
        units = [self._unit(seed, parts)]
        while sum(map(len, units)) < _MOST:
            members = set[fx.Node]().union(*units)
            behind = [u for m in members for u in m.users if self._fits(u, seed, parts)]
            beside = [
                s
                for m in members
                for s in m.all_input_nodes
                if self._fits(s, seed, parts) and all(u in members for u in s.users)
            ]
            fitting = [n for n in (*behind, *beside) if n not in members]
            fitting = [self._unit(n, parts) for n in sorted(set(fitting), key=self.flow.order.__getitem__)]
            added = next((unit for unit in fitting if self._convex(members | unit)), None)
            if added is None:
                break
            units.append(added)
        while units and not self._closed(set[fx.Node]().union(*units)):
            units.pop()
        members = set[fx.Node]().union(*units)
        while members and _widens(last := max(members, key=self.flow.order.__getitem__)):
            members.remove(last)  # who reads it casts what he reads
        return self._with_what_is_before(members) if parts.before else members

    def _unit(self, node: fx.Node, parts: Parts) -> set[fx.Node]:
        """What comes with a node: a product of low rank has the products that it reads."""
        return {node} | (self.low_rank.get(node, set()) if parts.low_rank else set())

    def _low_rank(self, product: fx.Node) -> set[fx.Node]:
        """The products of few columns that a product alone reads, with what lies between; empty if there are none."""
        left, found, todo = _left(product), set[fx.Node](), [_left(product)]
        if _width(left) > WIDEST_MIDDLE:
            return set()
        while todo:
            node = todo.pop()
            pointwise = opname(node) in (*POINTWISE, *CASTS)
            if not _is_operator(node) or not (is_product(node) or pointwise) or _shape(node) != _shape(left):
                continue
            found.add(node)
            todo += [] if is_product(node) else node.all_input_nodes
        for node in sorted(found, key=self.flow.order.__getitem__):  # only what comes of a product
            if not is_product(node) and not found.intersection(node.all_input_nodes):
                found.discard(node)
        alone = all(u in found or u is product for n in found for u in n.users)
        return found if alone and any(map(is_product, found)) else set()

    def _fits(self, node: fx.Node, seed: fx.Node, parts: Parts) -> bool:
        """Whether a node may be behind a product, or beside it."""
        if node in self.taken or not _is_operator(node):
            return False
        same = _shape(node) == _shape(seed)
        if is_product(node):
            return same and self._inner(node, parts) == self._inner(seed, parts)
        if same and opname(node) in (*POINTWISE, *CASTS):
            return True
        return parts.reduced and _width(seed) <= WIDEST_PRODUCT and _along_rows(node, seed)

    def _inner(self, product: fx.Node, parts: Parts) -> str:
        """How much a product sums over, or the products that it reads."""
        few = self.low_rank.get(product, set()) if parts.low_rank else set()
        first = next((n for n in few if is_product(n)), product)
        return _shape(_left(first))

    def _with_what_is_before(self, members: set[fx.Node]) -> set[fx.Node]:
        """What only the products of a region read, of which they read blocks: it is computed as these are read."""
        found = set(members)
        for product in [m for m in members if is_product(m)]:
            left, todo = _left(product), [_left(product)]
            while todo and len(found) < _MOST:
                node = todo.pop(0)
                if node in found or node in self.taken or not _is_operator(node) or is_product(node):
                    continue
                pointwise = opname(node) in (*POINTWISE, *CASTS) and _broadcasts(node, left)
                fits = pointwise or _along_rows(node, left)
                if fits and all(u in found for u in node.users) and self._convex({*found, node}):
                    found.add(node)
                    todo += node.all_input_nodes
        return found

    def _convex(self, members: set[fx.Node]) -> bool:
        below = set[fx.Node]().union(*map(self.below, members))
        above = set[fx.Node]().union(*map(self.above, members))
        return not (below & above) - members

    def _closed(self, members: set[fx.Node]) -> bool:
        """Whether only the last node is read outside."""
        last = max(members, key=self.flow.order.__getitem__)
        return all(u in members for n in members if n is not last for u in n.users)

    def written(self, members: list[fx.Node]) -> fx.Node | None:
        """An input that is another one where the last node stands than where it was read."""
        order, last = self.flow.order, members[-1]
        for member in members:
            for node in member.all_input_nodes:
                writers = self.flow.writers.get(self.flow.base[node], ())
                if any(order[member] < order[w] < order[last] for w in writers):
                    return node
        return None


def is_product(node: fx.Node) -> bool:
    """Whether a node is a product of rows with a matrix."""
    right: Any = node.args[1 + (opname(node) == "addmm")] if opname(node) in _PRODUCTS else None
    value = None if right is None else fake(right)
    return value is not None and value.dim() == 2


def _left(product: fx.Node) -> Any:
    return product.args[1 if opname(product) == "addmm" else 0]


def _widens(node: fx.Node) -> bool:
    """Whether a node is a cast to no narrower dtype."""
    source: Any = node.args[0] if opname(node) in CASTS else None
    value, given = fake(node), None if source is None else fake(source)
    return value is not None and given is not None and value.dtype.itemsize >= given.dtype.itemsize


def _is_operator(node: fx.Node) -> bool:
    value = fake(node)
    return node.op == "call_function" and value is not None and value.is_floating_point() and not mutates(node)


def _shape(node: Any) -> str:
    """A value's sizes, with the names of those that are free."""
    value = fake(node)
    return "" if value is None else str(list(value.shape))


def _width(node: fx.Node) -> int:
    value = fake(node)
    width: Any = None if value is None or not value.dim() else value.shape[-1]
    return width if isinstance(width, int) else 1 << 30


def _broadcasts(node: fx.Node, rows: fx.Node) -> bool:
    """Whether a value runs over the rows and columns of another, over one of both, or over none."""
    value, whole = fake(node), fake(rows)
    if value is None or whole is None or value.dim() > whole.dim():
        return False
    lead = [str(size) for size in value.shape[:-1]]
    fits = lead == [str(size) for size in whole.shape[:-1]] or all(size == "1" for size in lead)
    return fits and (not value.dim() or str(value.shape[-1]) in ("1", str(whole.shape[-1])))


def _along_rows(node: fx.Node, rows: fx.Node) -> bool:
    """Whether a node reduces rows of a value's shape (a norm, a softmax, a mean that keeps its axis), or is pointwise
    on what came of that."""
    name, value, whole = opname(node), fake(node), fake(rows)
    if value is None or whole is None or not _broadcasts(node, rows) or value.dim() != whole.dim():
        return False
    if name in (*POINTWISE, *CASTS):
        return True
    if name in ROWWISE:
        axes = argument(node, 1, "normalized_shape" if name.endswith("norm") else "dim")
        last = [value.shape[-1]] if name.endswith("norm") else [-1]
        found = list(axes) if isinstance(axes, list | tuple) else [axes]
        return found == last or (not name.endswith("norm") and found == [value.dim() - 1])
    kept = [str(size) for size in (*whole.shape[:-1], 1)] == [str(size) for size in value.shape]
    return name in REDUCED and kept and _shape(node.args[0]) == _shape(rows)
