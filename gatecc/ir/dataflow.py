"""Flow: where the values of a program come from, and who writes to whose storage. Computed in one sweep."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import fx
from torch._ops import OpOverload

from gatecc.ir.ops import CONTRACTIONS, SHAPE_ONLY, mutates, opname, written
from gatecc.ir.program import Program


class Flow:
    """``inputs``: those inputs of a node whose values matter. ``data``: nodes whose values depend on an input of the
    program. ``learned``: nodes whose values depend on a parameter. ``raw``: nodes that come from parameters and
    constants without any contraction. ``base``: the node that owns a view's storage. ``writers``: the nodes that write
    to a base's storage, in order.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.order: dict[fx.Node, int] = {}
        self.inputs: dict[fx.Node, list[fx.Node]] = {}
        self.data: set[fx.Node] = set()
        self.learned: set[fx.Node] = set()
        self.raw: set[fx.Node] = set()
        self.base: dict[fx.Node, fx.Node] = {}
        self.writers: dict[fx.Node, list[fx.Node]] = {}
        for index, node in enumerate(program.graph.nodes):
            self.order[node] = index
            self._visit(node)

    def add(self, node: fx.Node) -> None:
        """Know a node that was put into the graph since, right behind the last of its inputs."""
        self.order[node] = max(self.order[source] for source in node.all_input_nodes)
        self._visit(node)

    def writes_to(self, node: fx.Node) -> list[fx.Node]:
        """Who writes to a value's storage. Nobody does to what a rewrite has put in since: it asked before it did."""
        return self.writers.get(self.base.get(node, node), [])

    def _visit(self, node: fx.Node) -> None:
        name = opname(node)
        sources = self.inputs[node] = value_inputs(node)
        if self.program.is_input(node) or any(s in self.data for s in sources):
            self.data.add(node)
        if self.program.is_parameter(node) or any(s in self.learned for s in sources):
            self.learned.add(node)
        if not self.program.is_input(node) and name not in CONTRACTIONS and all(s in self.raw for s in sources):
            self.raw.add(node)
        viewed = _aliased(node)
        self.base[node] = self.base[viewed] if viewed is not None else node
        if not mutates(node) or name == "detach":
            return
        for target in (self.base[given] for given in written(node) or sources[:1]):
            self.writers.setdefault(target, []).append(node)
            if node in self.data:
                self.data.add(target)
            if node in self.learned:
                self.learned.add(target)
            if any(s not in self.raw for s in sources):
                self.raw.discard(target)


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values matter to the node (not their shapes alone)."""
    inputs = node.all_input_nodes
    if opname(node) in SHAPE_ONLY:
        return [n for n in inputs if n is not node.args[0]]
    return inputs


def _aliased(node: fx.Node) -> fx.Node | None:
    """The argument whose storage the result shares (or may share)."""
    if opname(node) == "getitem":
        return node.all_input_nodes[0]
    if not isinstance(node.target, OpOverload) or not _returns_alias(node.target):
        return None
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


@cache
def _returns_alias(target: Any) -> bool:
    return any(r.alias_info is not None for r in target._schema.returns)
