"""DataWriter: writes the data nodes of a step, which are computed for the new tokens."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from gatecc.decoder.analysis.axes import NOW, Span
from gatecc.decoder.emit import lower
from gatecc.decoder.emit.attention import AttentionWriter
from gatecc.decoder.emit.operands import Operands
from gatecc.decoder.emit.positions import SIZED, sized
from gatecc.decoder.emit.slots import SlotWriter
from gatecc.decoder.refuse import refusal
from gatecc.decoder.rules import slots as marks
from gatecc.ir.match.axes import permutation
from gatecc.ir.ops import RESHAPES, SHAPE_ONLY, TRANSPOSES, named, opname
from gatecc.ir.program import shape
from gatecc.ops import registry

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
        if self.plan.program.path(node) is not None:
            return self.writer.weight(node)
        if node.target is operator.getitem and isinstance(self.env.get(node.all_input_nodes[0]), tuple):
            return self.env[node.all_input_nodes[0]][int(str(node.args[1]))]
        if lower.is_alias(node) and node.args[0] in self.env and node not in self.plan.flow.writers:
            return self.env[node.args[0]]
        if opname(node) == "scaled_dot_product_attention":
            return self.attention.attention(node)
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
        return lower.call(self.writer.graph, self._function(node), args, kwargs)

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

    def _function(self, node: fx.Node) -> Any:
        """What a node calls, or what its operator has for one token in its place."""
        found = registry.find(node.target) if self.single else None
        return (found.step.one_token(node) if found is not None and found.step is not None else None) or node.target


def slice_bounds(node: fx.Node) -> tuple[int, int] | None:
    """Start and end of a slice of step 1 along an axis of known size; None for any other."""
    size = shape(node.all_input_nodes[0])[int(named(node, "dim", 0))]
    bounds = named(node, "start"), named(node, "end")
    known = all(x is None or isinstance(x, int) for x in bounds)
    if not isinstance(size, int) or not known or named(node, "step", 1) != 1:
        return None
    start, end, _ = slice(*bounds).indices(size)
    return start, max(start, end)
