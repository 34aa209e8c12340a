"""copies: copies, casts to the dtype that a value has, and dropout of eval mode are no nodes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject
from gatecc.codegen.onnx.lower.views import Views, equal_shapes
from gatecc.ir.ops import CASTS, opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.program import fake


class Copies(GraphLowering):
    """x.to(its dtype), x.contiguous(), dropout(x) -> x; nothing that a report would list."""

    name = "copies"
    after = ("attention",)

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        views = Views(subject.flow())
        for node in list(subject.program.calls()):
            source = _uncast(node, views) if opname(node) in CASTS else views.idle(node)
            if source is not node and node.users:
                node.replace_all_uses_with(source)
        yield from ()


def _uncast(node: fx.Node, views: Views) -> fx.Node:
    source = node.args[0]
    if not isinstance(source, fx.Node) or views.written(node) or views.written(source):
        return node
    one, other = fake(source), fake(node)
    alike = one is not None and other is not None and one.dtype == other.dtype and one.device == other.device
    return source if alike and equal_shapes(source, node) else node


__all__ = ["Copies"]
