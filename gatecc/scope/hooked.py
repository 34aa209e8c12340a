"""The order of a graph whose variant calls hooks, and who reads what the hooks return.

The model's own nodes and the boundaries of its calls stay in the order in which the model runs them. Nodes that an edit
made are pure and move: one that reads the output of a hooked module has to wait until its hooks were called.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import cast

from torch import fx

from gatecc.errors import CaptureError
from gatecc.ir.boundary import Boundary, within
from gatecc.ir.program import Program, origin
from gatecc.scope.hooks import entering, leaving

Item = fx.Node | Boundary


class Hooked:
    """The nodes and boundaries of a program in an order that can be run, and where each value is read."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.of_value: dict[fx.Node, list[tuple[Boundary, int]]] = {}
        for boundary in program.boundaries:
            for slot, value in enumerate(boundary.values):
                self.of_value.setdefault(value, []).append((boundary, slot))

    def source(self, reader: Item, value: fx.Node) -> tuple[Boundary, int] | None:
        """The boundary through which a reader reads a value last, and the slot; None if it reads the node itself."""
        found = None
        for boundary, slot in self.of_value.get(value, ()):
            if boundary is not reader and self._reads_through(reader, boundary, slot):
                found = boundary, slot
        return found

    def _reads_through(self, reader: Item, boundary: Boundary, slot: int) -> bool:
        if reader in boundary.readers[slot]:
            return True
        if boundary.place is None and boundary.leaving:  # of a module that an edit calls: its own code reads inside
            entry = boundary.entry
            return entry is None or not any(reader in inside for inside in entry.readers)
        if isinstance(reader, fx.Node):
            if reader in self.program.captured or reader.op != "call_function":
                return False
            owner = self.program.relative_name(origin(reader).owner)
        else:
            if reader.place is not None:
                return False
            owner = reader.path
        return within(owner, boundary.path) != boundary.leaving

    def order(self) -> Iterator[Item]:
        """Raises CaptureError if a hooked module would have to be left before it is entered."""
        done: set[Item] = set()
        for item in self._candidates():
            if not self._moves(item) or all(needed in done for needed in self._needs(item)):
                yield from self._emit(item, done, set())
        for item in (*self.program.graph.nodes, *self.program.boundaries):
            if isinstance(item, Boundary) or item.op != "get_attr":
                yield from self._emit(item, done, set())

    def _candidates(self) -> Iterator[Item]:
        """The items as they come in the graph, a boundary once every node that the model ran before it has come.

        Parameters are read as late as possible, for a hook may make them.
        """
        captured = self.program.captured
        nodes = list(self.program.graph.nodes)
        last = [-1] * (len(captured) + 1)  # where the last of the first n captured nodes is now
        for i, node in enumerate(nodes):
            if node in captured:
                last[captured[node] + 1] = i
        last = list(accumulate(last, max))
        waiting = [b for b in self.program.boundaries if b.place is not None]
        todo = iter([(last[cast("int", b.place)], b) for b in waiting])
        upcoming = next(todo, None)
        for i, node in enumerate(nodes):
            while upcoming is not None and upcoming[0] < i:
                yield upcoming[1]
                upcoming = next(todo, None)
            if node.op not in ("get_attr", "output"):
                yield node

    def _emit(self, item: Item, done: set[Item], above: set[Item]) -> Iterator[Item]:
        if item in done:
            return
        for needed in self._needs(item):
            if needed in done:
                continue
            if needed in above or not self._moves(needed):
                raise CaptureError(
                    "hooks on a submodule cannot be called where the rewritten graph calls it",
                    where=self.program.fqn or type(self.program.module).__name__,
                    found=f"{_name(item)} needs {_name(needed)}, which comes later",
                    do="take the hook off for this call (handle.remove())",
                )
            yield from self._emit(needed, done, above | {item})
        done.add(item)
        yield item

    def _moves(self, item: Item) -> bool:
        """Whether an item has no place of its own in the order of the model."""
        if isinstance(item, Boundary):
            return item.place is None
        return item.op == "get_attr" or item not in self.program.captured

    def _needs(self, item: Item) -> list[Item]:
        values = item.values if isinstance(item, Boundary) else item.all_input_nodes
        needed: list[Item] = []
        for value in values:
            source = self.source(item, value)
            needed.append(value if source is None else source[0])
        if isinstance(item, Boundary) and item.entry is not None:
            needed.append(item.entry)
        return needed


def _name(item: Item) -> str:
    if isinstance(item, fx.Node):
        return item.name
    return f"{'the output' if item.leaving else 'the call'} of {item.path}"


class HookCalls:
    """Puts calls of hooks into a graph that is being printed."""

    def __init__(self, program: Program, graph: fx.Graph, copied: dict[fx.Node, fx.Node]) -> None:
        self.program = program
        self.graph = graph
        self.copied = copied
        self.hooked = Hooked(program)
        self.results: dict[Boundary, fx.Node] = {}

    def order(self) -> Iterator[Item]:
        """The nodes, and the boundaries between them."""
        return self.hooked.order()

    def reader(self, item: Item) -> Callable[[fx.Node], fx.Node]:
        """What stands in the new graph for a value that an item reads."""

        def value(node: fx.Node) -> fx.Node:
            source = self.hooked.source(item, node)
            if source is None:
                return self.copied[node]
            return self.graph.call_function(operator.getitem, (self.results[source[0]], source[1]))

        return value

    def call(self, boundary: Boundary) -> None:
        """Call the hooks of one side of a module."""
        where = self.program.full_name(boundary.path)
        module = self.graph.get_attr(boundary.path)
        values = [self.reader(boundary)(value) for value in boundary.values]
        if boundary.entry is None:
            self.results[boundary] = self.graph.call_function(entering(boundary, where), (module, values))
            return
        entry = self.results[boundary.entry]
        entered = self.graph.call_function(operator.getitem, (entry, len(boundary.entry.values)))
        self.results[boundary] = self.graph.call_function(leaving(boundary, where), (module, entered, values))
