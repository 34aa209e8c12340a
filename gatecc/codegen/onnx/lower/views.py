"""Views: the earlier value that a chain of reshapes and transposes gives back."""

from __future__ import annotations

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.axes import permutation
from gatecc.ir.ops import DROPOUTS, RESHAPES, SAME_SHAPE, TRANSPOSES, opname
from gatecc.ir.sizes import node_shape, same

_MERGES = RESHAPES | frozenset(("unsqueeze", "squeeze"))


class Views:
    """Of one program. Tensors that are written to in place are never passed: a copy of one is another value."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def idle(self, node: fx.Node) -> fx.Node:
        """The value behind copies and dropout of eval mode."""
        while True:
            name, source = opname(node), node.args[0] if node.args else None
            kept = name in SAME_SHAPE or (name in DROPOUTS and not node.args[2])
            if not kept or not isinstance(source, fx.Node) or self.written(node) or self.written(source):
                return node
            node = source

    def settled(self, node: fx.Node) -> fx.Node:
        """The earliest value of which a chain of views is no more than a copy; the node itself, if there is none."""
        while True:
            node = self.idle(node)
            earlier = None if self.written(node) else self._earlier(node)
            if earlier is None:
                return node
            node = earlier

    def written(self, node: fx.Node) -> bool:
        """Whether somebody writes to the tensor of a value."""
        return bool(self.flow.writers.get(self.flow.base.get(node, node)))

    def settle_all(self) -> None:
        """Let the readers of every such chain read the earlier value."""
        for node in list(self.flow.program.calls()):
            if opname(node) in _MERGES | TRANSPOSES and node.users:
                source = self.settled(node)
                if source is not node:
                    node.replace_all_uses_with(source)

    def _earlier(self, node: fx.Node) -> fx.Node | None:
        name = opname(node)
        if name in _MERGES:
            source = node
            while opname(source) in _MERGES and isinstance(source.args[0], fx.Node):
                source = self.idle(source.args[0])
                if equal_shapes(source, node):
                    return source
        if name in TRANSPOSES and isinstance(node.args[0], fx.Node):
            inner = self.settled(node.args[0])
            source = inner.args[0] if opname(inner) in TRANSPOSES else None
            if isinstance(source, fx.Node) and _undoes(node, inner):
                return source
        return None


def _undoes(outer: fx.Node, inner: fx.Node) -> bool:
    rank = len(node_shape(outer) or ())
    one, two = permutation(inner, rank), permutation(outer, rank)
    return one is not None and two is not None and [one[i] for i in two] == list(range(rank))


def equal_shapes(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values have the same shape whatever the sizes of the inputs are."""
    a, b = node_shape(one), node_shape(other)
    return a is not None and b is not None and len(a) == len(b) and all(map(same, a, b))
