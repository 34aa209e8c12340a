"""flat: products and pointwise operators on (B * N, C) run on (B, N, C), so that nothing is reshaped around them.

GPT-2's Conv1D and OPT's feed-forward flatten the tokens, compute row by row, and take them apart again. Other lowerings
then see a product as a product, with its bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject
from gatecc.codegen.onnx.lower.views import Views, equal_shapes
from gatecc.codegen.onnx.lower.write import Writer, aten
from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import CASTS, DROPOUTS, RESHAPES, SAME_SHAPE, mutates, opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.sizes import node_shape, same

_POINTWISE = frozenset("relu gelu silu sigmoid tanh mul add sub div pow neg hardswish leaky_relu elu".split())
_ROW_BY_ROW = _POINTWISE | SAME_SHAPE | DROPOUTS | CASTS | frozenset("linear layer_norm rms_norm".split())
_PRODUCTS = ("addmm", "mm")


class Flat(GraphLowering):
    """view(f(view(x, (B * N, C))), (B, N, D)) -> f(x)."""

    name = "flat"

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        flow = subject.flow()
        views = Views(flow)
        unflattened: dict[fx.Node, fx.Node] = {}
        for node in list(subject.program.calls()):
            if views.written(node) or mutates(node):
                continue
            if opname(node) in RESHAPES:
                yield from self._reshape(node, unflattened, views)
            elif (source := _source(node, unflattened, flow)) is not None:
                unflattened[node] = _unflattened(Writer(subject.program, node, self.name), node, source, unflattened)

    def _reshape(self, node: fx.Node, unflattened: dict[fx.Node, fx.Node], views: Views) -> Iterator[Outcome]:
        given = node.args[0]
        if not isinstance(given, fx.Node):
            return
        if given in unflattened:
            if equal_shapes(unflattened[given], node):
                node.replace_all_uses_with(unflattened[given])
                yield self.done(node, "rows of all samples on one axis", "samples and tokens on axes of their own")
            return
        source, shape = views.settled(given), node_shape(node) or ()
        before = node_shape(source) or ()
        if len(shape) == 2 and len(before) == 3 and same(shape[-1], before[-1]) and isinstance(before[-1], int):
            unflattened[node] = source


def _source(node: fx.Node, unflattened: dict[fx.Node, fx.Node], flow: Flow) -> fx.Node | None:
    """What a node reads row by row; None if it does anything else."""
    name, inputs = opname(node), node.all_input_nodes
    flat = [n for n in inputs if n in unflattened]
    if not flat:
        return None
    others = [n for n in inputs if n not in unflattened]
    if name in _PRODUCTS:
        rows = node.args[1 if name == "addmm" else 0]
        plain = not node.kwargs and all(n not in flow.data for n in others)
        return unflattened[flat[0]] if plain and flat == [rows] and _narrow(others, 2) else None
    if name not in _ROW_BY_ROW or (name in DROPOUTS and node.args[2] is not False):
        return None
    if any(n in flow.data for n in others) or (name != "linear" and not _narrow(others, 1)):
        return None
    if name == "linear" and flat != [node.args[0]]:
        return None
    return unflattened[flat[0]]


def _narrow(nodes: list[fx.Node], rank: int) -> bool:
    return all(len(node_shape(n) or ()) <= rank for n in nodes)


def _unflattened(writer: Writer, node: fx.Node, source: fx.Node, unflattened: dict[fx.Node, fx.Node]) -> fx.Node:
    """The same on samples and tokens."""
    given: Any = node.args
    if opname(node) == "addmm":
        return writer.call(aten.linear.default, source, writer.call(aten.t.default, given[2]), given[0])
    if opname(node) == "mm":
        return writer.call(aten.linear.default, source, writer.call(aten.t.default, given[1]))
    args: Any = fx.map_arg(given, lambda n: unflattened.get(n, n))
    return writer.call(node.target, *args, **node.kwargs)


__all__ = ["Flat"]
