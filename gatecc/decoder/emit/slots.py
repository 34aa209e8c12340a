"""SlotWriter: writes out the marks, where a step reads what it remembers and writes what it is to remember."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from gatecc.decoder.analysis.axes import NOW, Span
from gatecc.decoder.emit.operands import Operands
from gatecc.decoder.rules import slots as marks
from gatecc.ir.ops import opname

_COMBINE: dict[str, Callable[..., Any]] = {"cumsum": torch.add, "cumprod": torch.mul, "logcumsumexp": torch.logaddexp}


class SlotWriter:
    """``next``: the next values of the slots, by their index; those that are written in place have none.

    ``single``: the step is for exactly one new token.
    """

    def __init__(self, operands: Operands, *, single: bool) -> None:
        self.operands, self.single = operands, single
        self.numbers, self.writer, self.plan = operands.numbers, operands.writer, operands.plan
        self.sources = operands.positions.sources
        self.next: dict[int, Any] = {}

    def mark(self, node: fx.Node) -> Any:
        """What stands for a mark in the step."""
        index, graph = int(str(node.args[-1])), self.writer.graph
        slot = self.plan.slots[index]
        held = graph.call_function(operator.getitem, (self.sources.given["slots"], index))
        if node.target is marks.recalled:
            return held
        if node.target is marks.resumed:
            start = self.operands.read(node, node.args[0])
            return graph.call_function(first, (self.numbers.bounds[NOW][0], start, held))
        x = self.operands.env[node.all_input_nodes[0]]
        if node.target is marks.kept:
            return self._keep(held, x, slot.axis, slot.span)
        new = self.numbers.bounds[NOW][1]
        if node.target in (marks.extended, marks.delayed):
            longer = graph.call_function(torch.cat, ([held, x], slot.axis))
            self.next[index] = self._copied(self.writer.narrow(longer, slot.axis, new, slot.count))
            return longer if node.target is marks.extended else self.writer.narrow(longer, slot.axis, 0, new)
        total = graph.call_function(_COMBINE[opname(slot.node)], (x, held))
        last = self.numbers.combine(operator.sub, new, 1)
        self.next[index] = self._copied(self.writer.narrow(total, slot.axis, last, 1))
        return total

    def _copied(self, part: fx.Node) -> fx.Node:
        """A copy of a part of many positions: a view would keep all of them alive."""
        return part if self.single else self.writer.graph.call_method("clone", (part,))

    def _keep(self, held: Any, x: Any, axis: int, span: Span) -> Any:
        """Write the new keys behind the old ones, and yield those of the span."""
        (first, new), (start, count) = self.numbers.bounds[NOW], self.numbers.bound(span)
        if span.window is not None:
            offset = self.sources.element("starts", self.plan.windows.index(span.window))
            first = self.numbers.combine(operator.sub, first, offset)
            start = self.numbers.combine(operator.sub, start, offset)
        self.writer.graph.call_method("copy_", (self.writer.narrow(held, axis, first, new), x))
        return self.writer.narrow(held, axis, start, count)

    def returned(self, node: fx.Node, result: Any) -> None:
        """Remember what an operator returns as its next states. ``result``: what was written for the node."""
        for source in node.all_input_nodes:
            if source.target in marks.STATES:
                index = int(str(source.args[-1]))
                output = self.plan.slots[index].output
                self.next[index] = self.writer.graph.call_function(operator.getitem, (result, output))


def first(past: int, start: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """The state that an operator starts from: ``start`` before the first token, then what was held."""
    return held if past else start.to(held.dtype)
