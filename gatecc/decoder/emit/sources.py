"""Sources: what a program that is being written is given, and does not compute."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from gatecc.decoder.emit.writer import GraphWriter


class Sources:
    """The elements of the tuples that a program takes. ``tables``: the nodes whose values its tuple of tables holds.

    ``context``: the nodes of the captured graph whose values the tuple of that name holds; ``history`` likewise.
    """

    def __init__(self, writer: GraphWriter, context: Sequence[fx.Node] = (), history: Sequence[fx.Node] = ()) -> None:
        self.writer, self.context, self.history = writer, list(context), list(history)
        self.tables: list[fx.Node] = []
        self.given: dict[str, fx.Node] = {}

    def add(self, name: str) -> fx.Node:
        """A placeholder of the program."""
        self.given[name] = self.writer.graph.placeholder(name)
        return self.given[name]

    def table(self, node: fx.Node) -> fx.Node:
        """The table of a position node, which is asked for if it was not yet."""
        if node not in self.tables:
            self.tables.append(node)
        return self.element("tables", self.tables.index(node))

    def element(self, name: str, at: int) -> fx.Node:
        """An element of one of the tuples."""
        graph = self.writer.graph
        return self.writer.once((name, at), lambda: graph.call_function(operator.getitem, (self.given[name], at)))
