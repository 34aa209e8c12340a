"""Tables: position values for a whole capacity, evaluated once and cut to rows in every step.

A table is right for a shorter length only if the values do not change as the length grows. That is tried at several
lengths when the decoder is made: what does change (ALiBi counted from the end) is evaluated in each step instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from gatecc.decoder.analysis.axes import ALL
from gatecc.decoder.emit.numbers import Numbers
from gatecc.decoder.emit.positions import PositionWriter
from gatecc.decoder.emit.sources import Sources
from gatecc.decoder.emit.writer import GraphWriter
from gatecc.decoder.plan import Plan

_TRIED = (2, 3, 5, 8, 13, 16)
_LARGEST = 1024  # constants of the graph up to here are lengths at which a change may be expected
_KEPT = 4  # sets of tables that are kept, for different batches and capacities


def longest(fits: Callable[[int], bool], wanted: int) -> int:
    """The largest length up to ``wanted`` that fits, if one that does not is the end of those that do."""
    if fits(wanted):
        return wanted
    low, high = 1, wanted
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Tables:
    """The tables of one plan, by batch and capacity."""

    def __init__(self, plan: Plan, nodes: Sequence[fx.Node]) -> None:
        self.plan, self.nodes = plan, list(nodes)
        self.module, weights = _program(plan, self.nodes)
        self.weights = list(weights.values())
        self._made: dict[tuple[int, int], tuple[tuple[tuple[int, int], ...], tuple[torch.Tensor, ...]]] = {}
        self._reach: dict[int, int] = {}

    def at(self, batch: int, capacity: int) -> tuple[torch.Tensor, ...]:
        """The tables for a capacity; they are made anew when a parameter that they were made from has changed."""
        stamp = tuple((w._version, w.data_ptr()) for w in self.weights)
        found = self._made.get((batch, capacity))
        if found is not None and found[0] == stamp:
            return found[1]
        if len(self._made) >= _KEPT:
            self._made.pop(next(iter(self._made)))
        with torch.no_grad():
            values = tuple(
                self._one_sample(x, node) for x, node in zip(self.run(batch, capacity), self.nodes, strict=True)
            )
        self._made[batch, capacity] = (stamp, values)
        return values

    def run(self, batch: int, length: int) -> tuple[torch.Tensor, ...]:
        """Evaluate all of them at one size."""
        return self.module(batch, length)

    def _one_sample(self, value: torch.Tensor, node: fx.Node) -> torch.Tensor:
        """Hold one sample where all are equal."""
        shape = node.meta["val"].shape
        batch = self.plan.lengths.batch
        if not len(shape) or isinstance(shape[0], int) or shape[0].node.expr not in batch or len(value) == 1:
            return value
        if not torch.equal(value[:1].expand_as(value), value):
            return value
        return value[:1].clone().expand_as(value)

    def reach(self, wanted: int) -> int:
        """The largest length up to ``wanted`` that the model has positions for."""
        if wanted not in self._reach:
            self._reach[wanted] = longest(self._fits, min(wanted, self.plan.lengths.bound))
        return self._reach[wanted]

    def _fits(self, length: int) -> bool:
        """Whether the tables can be evaluated at a length, and have the shapes that were captured."""
        try:
            with torch.no_grad():
                values = self.run(1, length)
        except (RuntimeError, IndexError):
            return False
        return all(self._has_shape(x, node, length) for x, node in zip(values, self.nodes, strict=True))

    def _has_shape(self, value: torch.Tensor, node: fx.Node, length: int) -> bool:
        shape = node.meta["val"].shape
        return all(got == length for got, size in zip(value.shape, shape, strict=True) if self.plan.lengths.pure(size))

    def unstable(self) -> frozenset[fx.Node]:
        """The nodes whose values change as the length grows."""
        lengths = self._lengths()
        whole = self.run(2, lengths[-1])
        found: set[fx.Node] = set()
        for length in lengths[:-1]:
            for node, long, short in zip(self.nodes, whole, self.run(2, length), strict=True):
                for axis in self.plan.lengths.axes(node):
                    long = long.narrow(axis, 0, min(length, long.shape[axis]))
                if long.shape != short.shape or not _equal(long, short):
                    found.add(node)
        return frozenset(found)

    def _lengths(self) -> list[int]:
        """Lengths to try, the largest last: small ones, and those around the constants of the graph."""
        numbers = {abs(x) for node in self.plan.nodes if self.plan.depends_on(node) == "position"
                   for x in tree_leaves((node.args, node.kwargs)) if type(x) is int}  # fmt: skip
        around = {c + d for c in numbers if max(_TRIED) < c <= _LARGEST for d in (-1, 1)}
        bound = self.reach(max(around | {max(_TRIED)}) + 8)
        return sorted({n for n in around | set(_TRIED) if n < bound} | {bound})


def _program(plan: Plan, nodes: Sequence[fx.Node]) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    """The program that evaluates position nodes for a whole capacity: (batch, length) -> a tuple of tensors."""
    writer = GraphWriter(plan)
    sources = Sources(writer)
    numbers = Numbers(writer, sources, sources.add("batch"))
    numbers.bounds[ALL] = 0, sources.add("length")
    positions = PositionWriter(sources, numbers, live=plan.dependence.positions)
    writer.graph.output(tuple(positions.whole(node) for node in nodes))
    return writer.module(), writer.weights


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for the last digits: vector and scalar code round differently."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
