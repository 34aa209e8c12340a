"""DataWriter: writes the data nodes of a step, which are computed for the new tokens."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from gatecc.decoder.analysis.axes import NOW, Span
from gatecc.decoder.analysis.labels import named
from gatecc.decoder.emit import lower
from gatecc.decoder.emit.attention import AttentionWriter
from gatecc.decoder.emit.operands import Operands
from gatecc.decoder.emit.positions import SIZED, sized
from gatecc.decoder.emit.slots import SlotWriter
from gatecc.decoder.refuse import refusal
from gatecc.decoder.rules import slots as marks
from gatecc.ir.match.axes import permutation
from gatecc.ir.ops import RESHAPES, SHAPE_ONLY, TRANSPOSES, opname
from gatecc.ir.program import shape
from gatecc.ops.linear_attention import linear_attention_step

_FILLS = frozenset("zeros ones full empty".split()) | SHAPE_ONLY


class DataWriter:
    """``single``: the step is for exactly one new token."""

    def __init__(self, operands: Operands, slots: SlotWriter, attention: AttentionWriter, *, single: bool) -> None:
        self.operands, self.slots, self.attention, self.single = operands, slots, attention, single
        self.writer, self.plan, self.env = operands.writer, operands.plan, operands.env

    def write(self, node: fx.Node) -> Any:
        """What stands for a data node in the step. Raises DecoderError if its sizes cannot be written out."""
        try:
            return self._data(node)
        except ArithmeticError as e:
            raise refusal(node, str(e)) from e

    def _data(self, node: fx.Node) -> Any:
        if node.target in marks.MARKS:
            return self.slots.mark(node)
        if node.op == "get_attr":
            return self.writer.weight(node)
        if node.target is operator.getitem and isinstance(self.env.get(node.all_input_nodes[0]), tuple):
            return self.env[node.all_input_nodes[0]][int(str(node.args[1]))]
        if lower.is_alias(node) and node.args[0] in self.env and node not in self.plan.flow.writers:
            return self.env[node.args[0]]
        if opname(node) == "scaled_dot_product_attention":
            return self.attention.attention(node)
        if opname(node) == "linear_attention" and self.single and self._is_simple(node):
            return self._one_token(node)
        result = self._call(node)
        self.slots.returned(node, result)
        return result

    def _call(self, node: fx.Node) -> fx.Node:
        name = opname(node)
        if name in RESHAPES | TRANSPOSES:
            laid = self._laid_out(node)
            if laid is not None:
                return laid
        read = self.operands.read
        if name in SIZED:
            return lower.call(self.writer.graph, sized(node), (read(node, node.args[0]), self.operands.shape(node)), {})
        if name in _FILLS and not isinstance(node.target, str):
            return self.operands.positions.filled(node, self.operands.shape(node))
        span = NOW if name == "arange" else None
        if name == "slice":
            axis = int(named(node, "dim", 0))
            span = self._span(node, axis)
            bounds = slice_bounds(node)
            if bounds is not None:
                return self.writer.narrow(read(node, node.args[0]), axis, bounds[0], bounds[1] - bounds[0])
        args = map_aggregate(node.args, lambda x: read(node, x, span))
        kwargs = map_aggregate(node.kwargs, lambda x: read(node, x, span))
        return lower.call(self.writer.graph, node.target, args, kwargs)

    def _span(self, node: fx.Node, axis: int) -> Span | None:
        """The positions that an axis of a node's operand runs over."""
        return self.plan.labels.of.get(node.all_input_nodes[0], (None,))[axis]

    def _laid_out(self, node: fx.Node) -> fx.Node | None:
        """One reshape in the place of a chain of reshapes and of transposes that move no more than axes of size 1.

        None where elements change their order, or where a write in place needs the view itself.
        """
        source, flow = node.all_input_nodes[0], self.plan.flow
        if source not in self.env or flow.writers.get(flow.base[node]):
            return None
        if opname(node) in TRANSPOSES:
            before = self.operands.shape(source)
            order = permutation(node, len(before))
            moved = None if order is None else [axis for axis in order if before[axis] != 1]
            if moved is None or moved != sorted(moved):
                return None
        return self.operands.reshape(self.env[source], self.operands.shape(node))

    # --- linear attention ---

    def _is_simple(self, node: fx.Node) -> bool:
        plain = named(node, "mask") is None and not named(node, "normalize")
        return plain and named(node, "gate_normalizer") is None

    def _one_token(self, node: fx.Node) -> tuple[Any, Any]:
        """linear_attention for one token: the step kernel on a copy of the state. -> (o, state)"""
        graph, read = self.writer.graph, self.operands.read
        held = graph.call_method("clone", (read(node, node.args[5]),))
        given = [read(node, x) for x in node.args[:5]]
        taken = [graph.call_method("select", (x, 2, 0)) if isinstance(x, fx.Node) else None for x in given]
        o = graph.call_function(linear_attention_step, (*taken, held), {"scale": named(node, "scale")})
        start = next(n for n in node.all_input_nodes if n.target in marks.STATES)
        self.slots.next[int(str(start.args[-1]))] = held
        return graph.call_method("unsqueeze", (o, 2)), held


def slice_bounds(node: fx.Node) -> tuple[int, int] | None:
    """Start and end of a slice of step 1 along an axis of known size; None for any other."""
    size = shape(node.all_input_nodes[0])[int(named(node, "dim", 0))]
    bounds = named(node, "start"), named(node, "end")
    known = all(x is None or isinstance(x, int) for x in bounds)
    if not isinstance(size, int) or not known or named(node, "step", 1) != 1:
        return None
    start, end, _ = slice(*bounds).indices(size)
    return start, max(start, end)
