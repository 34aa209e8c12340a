"""turned: pointwise operators between two transposes run on the layout before them, so that neither is needed.

A gate on the heads of attention is applied to (B, heads, N, D) and the result turned to (B, N, heads, D), which is how
the node of attention yields it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject
from gatecc.codegen.onnx.lower.views import Views
from gatecc.codegen.onnx.lower.write import Writer, aten
from gatecc.ir.match.axes import permutation
from gatecc.ir.ops import TRANSPOSES, argument, mutates, opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.sizes import node_shape

_POINTWISE = frozenset("mul add sub div sigmoid tanh silu gelu relu neg pow clamp clamp_min clamp_max".split())


class Turned(GraphLowering):
    """transpose(f(transpose(x), g)) -> f(x, transpose(g)); nothing that a report would list."""

    name = "turned"
    after = ("copies",)

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        views = Views(subject.flow())
        for node in list(subject.program.calls()):
            order = self._order(node, views)
            if order is not None:
                self._turn(Writer(subject.program, node, self.name), node, order, views)
        views.settle_all()
        yield from ()

    def _order(self, node: fx.Node, views: Views) -> list[int] | None:
        """The permutation that an operand has behind it, and all readers undo; None if there is none."""
        if opname(node) not in _POINTWISE or mutates(node) or views.written(node) or not node.users:
            return None
        rank = len(node_shape(node) or ())
        sources = [n for n in node.all_input_nodes if opname(n) in TRANSPOSES and len(node_shape(n) or ()) == rank]
        orders = [o for n in sources if not views.written(n) and (o := permutation(n, rank)) is not None]
        undone = [permutation(user, rank) if opname(user) in TRANSPOSES else None for user in node.users]
        for order in orders:
            back = sorted(range(rank), key=order.__getitem__)
            if all(u == back for u in undone):
                return back
        return None

    def _turn(self, writer: Writer, node: fx.Node, back: list[int], views: Views) -> None:
        def turned(value: Any) -> Any:
            if not isinstance(value, fx.Node):
                return value
            return value if not node_shape(value) else _turned(writer, value, back, views)

        args: Any = tuple(turned(a) for a in node.args)
        made = writer.call(node.target, *args, **node.kwargs)
        forward = sorted(range(len(back)), key=back.__getitem__)
        node.replace_all_uses_with(writer.call(aten.permute.default, made, forward))


def _turned(writer: Writer, value: fx.Node, order: list[int], views: Views) -> fx.Node:
    """A value with its axes in another order, through the views that it is made by."""
    missing = len(order) - len(node_shape(value) or ())
    axes: list[int | None] = [None] * missing + list(range(len(order) - missing))
    axes = [axes[i] for i in order]
    while not views.written(value) and isinstance(value.args[0] if value.args else None, fx.Node):
        before = _before(value)
        if before is None:
            break
        axes = [None if a is None else before[a] for a in axes]
        value = views.idle(value.all_input_nodes[0])
    kept = [a for a in axes if a is not None]
    if kept != sorted(kept):
        value = writer.call(aten.permute.default, value, kept)
    for at, axis in enumerate(axes):
        if axis is None:
            value = writer.call(aten.unsqueeze.default, value, at)
    return value


def _before(node: fx.Node) -> list[int | None] | None:
    """For each axis of a transpose or an unsqueeze, the axis of what it views; None if it is another operator."""
    rank = len(node_shape(node) or ())
    if opname(node) in TRANSPOSES:
        return permutation(node, rank)  # pyright: ignore[reportReturnType]
    if opname(node) == "unsqueeze":
        new = int(argument(node, 1, "dim")) % rank
        return [None if i == new else i - (i > new) for i in range(rank)]
    return None


__all__ = ["Turned"]
