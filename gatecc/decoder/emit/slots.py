"""SlotWriter: writes out the marks, where a step reads what it remembers and writes what it is to remember."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from gatecc.decoder.analysis.axes import NOW, Span
from gatecc.decoder.emit.operands import Operands
from gatecc.decoder.rules import slots as marks
from gatecc.ir.ops import opname

_aten = torch.ops.aten
_COMBINE = {"cumsum": _aten.add.Tensor, "cumprod": _aten.mul.Tensor, "logcumsumexp": _aten.logaddexp.default}


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
        index = int(str(node.args[-1]))
        slot, held = self.plan.slots[index], self.sources.slots[index]
        if node.target is marks.recalled:
            return held
        if node.target is marks.resumed:
            return self._resumed(node, held)
        x = self.operands.env[node.all_input_nodes[0]]
        if node.target is marks.kept:
            return self._keep(held, x, slot.axis, slot.span)
        new = self.numbers.bounds[NOW][1]
        if node.target in (marks.extended, marks.delayed):
            longer = self.writer.call(_aten.cat.default, ([held, x], slot.axis))
            self.next[index] = self._copied(self.writer.narrow(longer, slot.axis, new, slot.count))
            return longer if node.target is marks.extended else self.writer.narrow(longer, slot.axis, 0, new)
        total = self.writer.call(_COMBINE[opname(slot.node)], (x, held))
        last = self.numbers.combine(operator.sub, new, 1)
        self.next[index] = self._copied(self.writer.narrow(total, slot.axis, last, 1))
        return total

    def _resumed(self, node: fx.Node, held: fx.Node) -> fx.Node:
        """The state that an operator starts from: what is given before the first token, then what was held."""
        like, past = node.meta["val"], self.numbers.bounds[NOW][0]
        start = self.operands.read(node, node.args[0])
        if node.all_input_nodes[0].meta["val"].dtype != like.dtype:
            start = self.writer.call(_aten.to.dtype, (start, like.dtype))
        options = {"dtype": torch.int64, "device": like.device}
        count = self.writer.once("past", lambda: self.writer.call(_aten.scalar_tensor.default, (past,), options))
        began = self.writer.once("began", lambda: self.writer.call(_aten.gt.Scalar, (count, 0)))
        return self.writer.call(_aten.where.self, (began, held, start))

    def _copied(self, part: fx.Node) -> fx.Node:
        """A copy of a part of many positions: a view would keep all of them alive."""
        return part if self.single else self.writer.call(_aten.clone.default, (part,))

    def _keep(self, held: Any, x: Any, axis: int, span: Span) -> Any:
        """Write the new keys behind the old ones, and yield those of the span."""
        (first, new), (start, count) = self.numbers.bounds[NOW], self.numbers.bound(span)
        if span.window is not None:
            offset = self.sources.starts[self.plan.windows.index(span.window)]
            first = self.numbers.combine(operator.sub, first, offset)
            start = self.numbers.combine(operator.sub, start, offset)
        self.writer.call(_aten.copy_.default, (self.writer.narrow(held, axis, first, new), x))
        return self.writer.narrow(held, axis, start, count)

    def returned(self, node: fx.Node, result: Any) -> None:
        """Remember what an operator returns as its next states. ``result``: what was written for the node."""
        for source in node.all_input_nodes:
            if source.target in marks.STATES:
                index = int(str(source.args[-1]))
                output = self.plan.slots[index].output
                self.next[index] = self.writer.call(operator.getitem, (result, output))
