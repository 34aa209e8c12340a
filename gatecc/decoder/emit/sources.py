"""Sources: what a program that is being written is given, and does not compute. Each value is a placeholder."""

from __future__ import annotations

from typing import Any

from torch import fx

from gatecc.decoder.emit.writer import GraphWriter
from gatecc.ir.program import META, origin


class Sources:
    """``slots``, ``starts``: placeholders by index; ``history``, ``context``, ``carried``, ``tables``: by the captured
    nodes whose values they are. The tables come last, since which are needed is known only when all is written.
    """

    def __init__(self, writer: GraphWriter) -> None:
        self.writer = writer
        self.slots: list[fx.Node] = []
        self.starts: list[fx.Node] = []
        self.history: dict[fx.Node, fx.Node] = {}
        self.context: dict[fx.Node, fx.Node] = {}
        self.carried: dict[fx.Node, fx.Node] = {}
        self.tables: dict[fx.Node, fx.Node] = {}
        self._last: fx.Node | None = None

    def add(self, name: str, of: fx.Node | None = None) -> fx.Node:
        """A placeholder behind those that are there. ``of``: the captured node whose value it is."""
        graph = self.writer.graph
        with graph.inserting_after(self._last) if self._last is not None else graph.inserting_before():
            self._last = graph.placeholder(name)
        if of is not None:
            self._last.meta[META] = origin(of)
        return self._last

    def whole(self, node: fx.Node, length: Any) -> fx.Node:
        """The values per token of all ``length`` positions up to now."""
        return self.writer.narrow(self.history[node], 1, 0, length)

    def new(self, node: fx.Node) -> fx.Node | None:
        """The values per token of the new positions, where they are given by themselves."""
        del node

    def spread(self, part: fx.Node, node: fx.Node, batch: Any) -> fx.Node:
        """Part of a table, with a row for each sample."""
        del node, batch
        return part

    def table(self, node: fx.Node) -> fx.Node:
        """The table of a position node, which is asked for if it was not yet."""
        if node not in self.tables:
            self.tables[node] = self.add(f"table_{len(self.tables)}", node)
        return self.tables[node]
