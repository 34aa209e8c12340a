"""PositionWriter: writes out what does not depend on the tokens, at the positions that a reader asks for.

A static node is read from its table. A live one is computed in the step: asked for a few rows, operators that work
element by element or move axes ask their operands for the same rows, so that a mask costs T rows and not L.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_aggregate

from gatecc.decoder.analysis.axes import ALL, NOW, Span, Spans
from gatecc.decoder.emit.alias import is_alias
from gatecc.decoder.emit.numbers import Numbers
from gatecc.decoder.emit.sources import Sources
from gatecc.decoder.refuse import refusal
from gatecc.ir.match.axes import axis_map
from gatecc.ir.ops import CASTS, RESHAPES, SAME_SHAPE, SHAPE_ONLY, TRANSPOSES, opname
from gatecc.ir.sizes import node_shape

SIZED = RESHAPES | frozenset("expand broadcast_to".split())  # operators whose result a list of sizes describes in full
_aten = torch.ops.aten
_FILLS = {
    "zeros": _aten.zeros.default,
    "ones": _aten.ones.default,
    "full": _aten.full.default,
    "empty": _aten.empty.memory_format,
}
_LOGIC = frozenset("__and__ __or__ __xor__".split())  # of which torch does not say that they are pointwise
_MOVES = TRANSPOSES | SAME_SHAPE | CASTS | frozenset("unsqueeze squeeze expand detach".split())


class PositionWriter:
    """Writes position, live and context nodes. ``live``: the position nodes that are not read from tables."""

    def __init__(self, sources: Sources, numbers: Numbers, live: frozenset[fx.Node]) -> None:
        self.sources, self.numbers, self.live = sources, numbers, live
        self.writer, self.plan = sources.writer, sources.writer.plan
        self.lengths, self.flow = self.plan.lengths, self.plan.flow
        self._values: dict[tuple[fx.Node, Spans], Any] = {}
        self._wholes: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node, spans: Spans) -> Any:
        """A node at the positions that its reader wants: a span for each axis."""
        key = (node, spans)
        if key not in self._values:
            with self.writer.writing_for(node):
                self._values[key] = self._value(node, spans)
        return self._values[key]

    def _value(self, node: fx.Node, spans: Spans) -> Any:
        if all(span in (None, ALL) for span in spans):
            return self.whole(node)
        if node.op == "placeholder" and spans == (None, NOW):
            new = self.sources.new(node)
            if new is not None:
                return new
        if not self._is_static(node):
            pushed = self._pushed(node, spans)
            if pushed is not None:
                return pushed
        source = self._table(node) if self._is_static(node) else self.whole(node)
        for axis, span in enumerate(spans):
            if span is not None and not (span == ALL and not self._is_static(node)):
                source = self._narrowed(source, axis, span)
        return self.sources.spread(source, node, self.numbers.batch) if self._is_static(node) else source

    def _narrowed(self, source: fx.Node, axis: int, span: Span) -> fx.Node:
        return self.writer.once(
            ("narrow", source, axis, span), lambda: self.writer.narrow(source, axis, *self.numbers.bound(span))
        )

    # --- all positions ---

    def whole(self, node: fx.Node) -> Any:
        """A node at all positions up to now."""
        if node in self.sources.context:
            return self.sources.context[node]
        if node not in self._wholes:
            if self.flow.writers.get(self.flow.base.get(node, node)):
                self._in_order(node)
            if node not in self._wholes:
                self._wholes[node] = self._written(node)
        return self._wholes[node]

    def _written(self, node: fx.Node) -> Any:
        with self.writer.writing_for(node):
            return self._whole(node)

    def _whole(self, node: fx.Node) -> Any:
        if self.plan.depends_on(node) == "size":
            return self.numbers.size(node.meta["val"], ALL)
        if self.plan.program.path(node) is not None:
            return self.writer.weight(node)
        if node.op == "placeholder":
            return self.sources.whole(node, self.numbers.bounds[ALL][1])
        if self._is_static(node):
            source = self._table(node)
            for axis in self.lengths.axes(node):
                source = self._narrowed(source, axis, ALL)
            return self.sources.spread(source, node, self.numbers.batch)
        if is_alias(node) and isinstance(node.args[0], fx.Node):
            return self.whole(node.args[0])
        return self._called(node, self.whole, [ALL] * len(node_shape(node) or ()))

    def _in_order(self, node: fx.Node) -> None:
        """Write a tensor that is filled in place: everything that it needs, in the order of the graph."""
        for part in self.plan.evaluator.slice(node).nodes:
            if part not in self._wholes and self.plan.depends_on(part) != "size":
                self._wholes[part] = self._written(part)

    def _is_static(self, node: fx.Node) -> bool:
        """Whether the value is read from a table."""
        return self.plan.depends_on(node) == "position" and node not in self.live and node.op == "call_function"

    def _table(self, node: fx.Node) -> fx.Node:
        if any(not self.lengths.pure(size) for size in (node_shape(node) or ()) if self.lengths.has(size)):
            raise refusal(node, "it depends on the length in a way that cannot be continued")
        return self.sources.table(node)

    # --- operators ---

    def _called(self, node: fx.Node, read: Callable[[fx.Node], Any], spans: Any) -> Any:
        """The node's operator on operands as ``read`` yields them, with sizes for ``spans``."""
        name = opname(node)
        sizes = [self.numbers.size(size, span) for size, span in zip(node_shape(node) or (), spans, strict=True)]
        if name in SHAPE_ONLY:
            return self.filled(node, sizes)
        if name in SIZED and isinstance(node.args[0], fx.Node):
            return self.writer.call(sized(node), (read(node.args[0]), sizes))
        args = map_aggregate(node.args, lambda x: read(x) if isinstance(x, fx.Node) else x)
        kwargs = map_aggregate(node.kwargs, lambda x: read(x) if isinstance(x, fx.Node) else x)
        return self.writer.call(_function(node), args, kwargs)

    def filled(self, node: fx.Node, sizes: list[Any]) -> fx.Node:
        """A tensor made from sizes alone; those like another tensor take their shape from what was recorded."""
        held, name = node.meta["val"], opname(node).removeprefix("new_").removesuffix("_like")
        fill = [node.args[2 if opname(node) == "new_full" else 1]] if name == "full" else []
        options = {"dtype": held.dtype, "device": held.device}
        return self.writer.call(_FILLS[name], (sizes, *fill), options)

    # --- rows ---

    def _pushed(self, node: fx.Node, spans: Spans) -> Any:
        """The node's operator on the rows of its operands, None if rows of the result need more than that."""
        if node.op != "call_function" or self.flow.writers.get(self.flow.base.get(node, node)):
            return None
        if opname(node) == "index":
            return self._indexed(node, spans)
        moves = opname(node) in _MOVES or is_alias(node)
        pointwise = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
        if not moves and not pointwise and opname(node) not in _LOGIC:
            return None
        wanted: dict[fx.Node, Spans] = {}
        for source in node.all_input_nodes:
            if self.plan.depends_on(source) == "size":
                continue
            rows = self._rows(node, source, spans)
            if rows is None:
                return None
            wanted[source] = rows
        return self._called(node, lambda x: self.value(x, wanted[x]) if x in wanted else self.whole(x), spans)

    def _rows(self, node: fx.Node, source: fx.Node, spans: Spans) -> Spans | None:
        axes = axis_map(node, source)
        shape = node_shape(source)
        if axes is None or shape is None:
            return None
        rows: list[Span | None] = [None] * len(shape)
        for axis, before in enumerate(axes):
            if before is not None and self.lengths.has(shape[before]):
                rows[before] = spans[axis]
        kept = all(row is not None for row, size in zip(rows, shape, strict=True) if self.lengths.has(size))
        return tuple(rows) if kept else None

    def _indexed(self, node: fx.Node, spans: Spans) -> Any:
        """x[i, j]: the axes of the result are those of the indices, and x is needed as a whole."""
        source, indices = node.args[0], node.args[1]
        if not isinstance(indices, list | tuple) or any(x is None for x in indices):
            return None
        if not isinstance(source, fx.Node) or len(indices) != len(node_shape(source) or ()):
            return None
        read: list[Any] = []
        for index in indices:
            assert isinstance(index, fx.Node)
            shape = node_shape(index) or ()
            shift = len(spans) - len(shape)
            rows = tuple(spans[i + shift] if self.lengths.has(size) else None for i, size in enumerate(shape))
            read.append(self.value(index, rows))
        return self.writer.call(_function(node), (self.whole(source), read))


def sized(node: fx.Node) -> Callable[..., Any]:
    """The operator that a reshape of any kind is when all of its sizes are given."""
    if opname(node) in ("expand", "broadcast_to"):
        return _aten.expand.default
    return _aten.view.default if opname(node) == "view" else _aten.reshape.default


def _function(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target
