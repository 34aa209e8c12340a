"""DataWriter: writes the data nodes of a step, which are computed for the new tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from gatecc.decoder.analysis.axes import NOW, Span
from gatecc.decoder.emit.alias import is_alias
from gatecc.decoder.emit.attention import AttentionWriter
from gatecc.decoder.emit.operands import Operands
from gatecc.decoder.emit.positions import SIZED, sized
from gatecc.decoder.emit.slots import SlotWriter
from gatecc.decoder.refuse import refusal
from gatecc.decoder.rules import slots as marks
from gatecc.ir.ops import RESHAPES, SHAPE_ONLY, named, opname
from gatecc.ir.program import shape

_FILLS = frozenset("zeros ones full empty".split()) | SHAPE_ONLY


class DataWriter:
    """Writes one data node after the other, in the order of the captured graph."""

    def __init__(self, operands: Operands, slots: SlotWriter, attention: AttentionWriter) -> None:
        self.operands, self.slots, self.attention = operands, slots, attention
        self.writer, self.plan, self.env = operands.writer, operands.plan, operands.env

    def write(self, node: fx.Node) -> Any:
        """What stands for a data node in the step. Raises DecoderError if its sizes cannot be written out."""
        try:
            with self.writer.writing_for(node):
                return self._data(node)
        except ArithmeticError as e:
            raise refusal(node, str(e)) from e

    def _data(self, node: fx.Node) -> Any:
        if node.target in marks.MARKS:
            return self.slots.mark(node)
        if self.plan.program.path(node) is not None:
            return self.writer.weight(node)
        if is_alias(node) and node.args[0] in self.env and node not in self.plan.flow.writers:
            return self.env[node.args[0]]
        if opname(node) == "scaled_dot_product_attention":
            return self.attention.write(node)
        result = self._call(node)
        self.slots.returned(node, result)
        return result

    def _call(self, node: fx.Node) -> fx.Node:
        name, read = opname(node), self.operands.read
        if name in SIZED:
            return self.writer.call(self._sized(node), (read(node, node.args[0]), self.operands.shape(node)))
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
        assert callable(node.target)
        return self.writer.call(node.target, tuple(args), dict(kwargs))

    def _sized(self, node: fx.Node) -> Any:
        """A view only where something writes through it: keys lie in memory otherwise than in the captured graph."""
        flow = self.plan.flow
        free = opname(node) in RESHAPES and not flow.writers.get(flow.base[node])
        return torch.ops.aten.reshape.default if free else sized(node)

    def _span(self, node: fx.Node, axis: int) -> Span | None:
        """The positions that an axis of a node's operand runs over."""
        return self.plan.labels.of.get(node.all_input_nodes[0], (None,))[axis]


def slice_bounds(node: fx.Node) -> tuple[int, int] | None:
    """Start and end of a slice of step 1 along an axis of known size; None for any other."""
    size = shape(node.all_input_nodes[0])[int(named(node, "dim", 0))]
    bounds = named(node, "start"), named(node, "end")
    known = all(x is None or isinstance(x, int) for x in bounds)
    if not isinstance(size, int) or not known or named(node, "step", 1) != 1:
        return None
    start, end, _ = slice(*bounds).indices(size)
    return start, max(start, end)
