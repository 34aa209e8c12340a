"""Positions: writing out what does not depend on the tokens, at the positions that a reader asks for.

A static node is read from its table. A live one is computed in the step: asked for a few rows, operators that work
element by element or move axes ask their operands for the same rows, so that a mask costs T rows and not L.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_aggregate
from torch.utils._sympy.functions import FloorDiv

from gatecc.decoder.analysis.axes import ALL, NOW, Span, Spans
from gatecc.decoder.emit import lower
from gatecc.decoder.plan import Plan
from gatecc.decoder.refuse import refusal
from gatecc.ir.match.axes import axis_map
from gatecc.ir.ops import CASTS, RESHAPES, SAME_SHAPE, SHAPE_ONLY, TRANSPOSES, opname
from gatecc.ir.sizes import expression, node_shape

SIZED = RESHAPES | frozenset("expand broadcast_to".split())  # what a list of sizes says in full
_MOVES = TRANSPOSES | SAME_SHAPE | CASTS | frozenset("unsqueeze squeeze expand detach".split())
_ARITHMETIC: dict[Any, Callable[..., Any]] = {sympy.Add: operator.add, sympy.Mul: operator.mul}


class Positions:
    """Writes the nodes of ``graph``. ``bounds``: first position and number of positions of each span."""

    def __init__(self, plan: Plan, live: frozenset[fx.Node]) -> None:
        self.plan, self.live = plan, live
        self.lengths, self.labels, self.flow = plan.lengths, plan.labels, plan.flow
        self.graph = fx.Graph()
        self.weights: dict[str, torch.Tensor] = {}
        self.tables: list[fx.Node] = []  # in the order of the program's tuple of tables
        self.inputs: dict[str, fx.Node] = {}
        self.given = plan.context  # the nodes that the program's tuple ``context`` holds
        self.bounds: dict[Span, tuple[Any, Any]] = {}
        self.batch: Any = None
        self._known: dict[Any, Any] = {}

    def module(self) -> fx.GraphModule:
        """The graph as a module whose attributes are the weights."""
        root = torch.nn.Module()
        for name, tensor in self.weights.items():
            root.register_buffer(name, tensor)
        return fx.GraphModule(root, self.graph)

    # --- numbers ---

    def once(self, key: Any, function: Callable[..., Any], *args: Any) -> Any:
        """A call that is written once and read again."""
        if key not in self._known:
            self._known[key] = self.graph.call_function(function, args)
        return self._known[key]

    def combine(self, function: Callable[..., Any], one: Any, other: Any) -> Any:
        """Arithmetic on numbers, done at once where both are known."""
        if not isinstance(one, fx.Node) and not isinstance(other, fx.Node):
            return function(one, other)
        if function in (operator.add, operator.sub) and isinstance(other, int) and other == 0:
            return one
        if function is operator.mul and 1 in (one, other):
            return other if one == 1 else one
        return self.once((function, one, other), function, one, other)

    def bound(self, span: Span) -> tuple[Any, Any]:
        """The first position of a span and how many it has."""
        if span not in self.bounds:
            assert span.window is not None
            past, _ = self.bounds[NOW]
            start = self.combine(max, self.combine(operator.add, past, 1 - span.window), 0)
            self.bounds[span] = start, self.combine(operator.sub, self.bounds[ALL][1], start)
        return self.bounds[span]

    def size(self, size: Any, span: Span | None) -> Any:
        """A size with the positions of ``span`` in the place of the length."""
        return size if isinstance(size, int) else self._number(expression(size), span)

    def _number(self, found: Any, span: Span | None) -> Any:
        if found.is_Integer:
            return int(found)
        if found in self.lengths.batch:
            return self.batch
        if found in self.lengths.length:
            assert span is not None
            return self.bound(span)[1]
        if found in self.lengths.other:
            return self._measured(found)
        operands = [self._number(a, span) for a in found.args]
        if isinstance(found, FloorDiv):
            return self.combine(operator.floordiv, *operands)
        function = _ARITHMETIC.get(found.func) or {"Max": max, "Min": min}.get(type(found).__name__)
        if function is None or not operands:
            raise ArithmeticError(f"the size {found} cannot be written out")
        result = operands[0]
        for operand in operands[1:]:
            result = self.combine(function, result, operand)
        return result

    def _measured(self, symbol: Any) -> Any:
        """The length of a context, taken from a tensor of that length."""
        for node in self.given:
            sizes = [expression(size) for size in node_shape(node) or ()]
            if symbol in sizes:
                at = sizes.index(symbol)
                if ("extent", symbol) not in self._known:
                    self._known["extent", symbol] = self.graph.call_method("size", (self.whole(node), at))
                return self._known["extent", symbol]
        raise ArithmeticError(f"the size {symbol} is that of no input")

    def narrow(self, x: Any, axis: int, start: Any, count: Any) -> fx.Node:
        """Part of an axis."""
        return self.graph.call_method("narrow", (x, axis, start, count))

    # --- tensors ---

    def weight(self, node: fx.Node) -> fx.Node:
        """A parameter, buffer or constant."""
        name = str(node.target).replace(".", "_")
        if name not in self.weights:
            self.weights[name] = self.plan.tensor(node)
            self._known["weight", name] = self.graph.create_node("get_attr", name)
        return self._known["weight", name]

    def value(self, node: fx.Node, spans: Spans) -> Any:
        """A position, live or context node at the positions that its reader wants."""
        key = (node, spans)
        if key not in self._known:
            self._known[key] = self._value(node, spans)
        return self._known[key]

    def _value(self, node: fx.Node, spans: Spans) -> Any:
        if all(span in (None, ALL) for span in spans):
            return self.whole(node)
        if not self._is_static(node):
            pushed = self._pushed(node, spans)
            if pushed is not None:
                return pushed
        source = self._table(node) if self._is_static(node) else self.whole(node)
        for axis, span in enumerate(spans):
            if span is not None and not (span == ALL and not self._is_static(node)):
                source = self.narrow(source, axis, *self.bound(span))
        return source

    def whole(self, node: fx.Node) -> Any:
        """A node at all positions up to now."""
        if node in self.given:
            at = self.given.index(node)
            return self.once(("context", at), operator.getitem, self.inputs["context"], at)
        key = ("whole", node)
        if key not in self._known:
            if self.flow.writers.get(self.flow.base.get(node, node)):
                self._in_order(node)
            if key not in self._known:
                self._known[key] = self._whole(node)
        return self._known[key]

    def _whole(self, node: fx.Node) -> Any:
        kind = self.plan.kind(node)
        if kind == "size":
            return self.size(node.meta["val"], ALL)
        if node.op == "get_attr":
            return self.weight(node)
        if node.op == "placeholder":
            return self._given(node)
        if self._is_static(node):
            source = self._table(node)
            for axis in self.lengths.axes(node):
                source = self.narrow(source, axis, *self.bounds[ALL])
            return source
        if lower.is_alias(node) and isinstance(node.args[0], fx.Node):
            return self.whole(node.args[0])
        return self._called(node, self.whole, [ALL] * len(node_shape(node) or ()))

    def _called(self, node: fx.Node, read: Callable[[fx.Node], Any], spans: Any) -> Any:
        """The node's operator on operands as ``read`` yields them, with sizes for ``spans``."""
        name = opname(node)
        sizes = [self.size(size, span) for size, span in zip(node_shape(node) or (), spans, strict=True)]
        if name in SHAPE_ONLY:
            return self.filled(node, sizes)
        if name in SIZED and isinstance(node.args[0], fx.Node):
            return self.graph.call_function(sized(node), (read(node.args[0]), sizes))
        args = map_aggregate(node.args, lambda x: read(x) if isinstance(x, fx.Node) else x)
        kwargs = map_aggregate(node.kwargs, lambda x: read(x) if isinstance(x, fx.Node) else x)
        return self.graph.call_function(called(node), args, kwargs)

    def filled(self, node: fx.Node, sizes: list[Any]) -> fx.Node:
        """A tensor made from sizes alone; those like another tensor take their shape from what was recorded."""
        held, name = node.meta["val"], opname(node).removeprefix("new_").removesuffix("_like")
        function = {"zeros": torch.zeros, "ones": torch.ones, "full": torch.full, "empty": torch.empty}[name]
        fill = [node.args[2 if opname(node) == "new_full" else 1]] if name == "full" else []
        return self.graph.call_function(function, (sizes, *fill), {"dtype": held.dtype, "device": held.device})

    def _in_order(self, node: fx.Node) -> None:
        """Write a tensor that is filled in place: everything that it needs, in the order of the graph."""
        for part in self.plan.evaluator.slice(node).nodes:
            key = ("whole", part)
            if key not in self._known and self.plan.kind(part) != "size":
                self._known[key] = self._whole(part)

    # --- rows ---

    def _pushed(self, node: fx.Node, spans: Spans) -> Any:
        """The node's operator on the rows of its operands, None if rows of the result need more than that."""
        if node.op != "call_function" or self.flow.writers.get(self.flow.base.get(node, node)):
            return None
        if opname(node) == "index":
            return self._indexed(node, spans)
        moves = opname(node) in _MOVES or lower.is_alias(node)
        if not moves and not (isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags):
            return None
        wanted: dict[fx.Node, Spans] = {}
        for source in node.all_input_nodes:
            if self.plan.kind(source) == "size":
                continue
            rows = self._rows(node, source, spans)
            if rows is None:
                return None
            wanted[source] = rows
        return self._called(node, lambda x: self.value(x, wanted[x]) if x in wanted else self.whole(x), spans)

    def _rows(self, node: fx.Node, source: fx.Node, spans: Spans) -> Spans | None:
        ways = axis_map(node, source)
        shape = node_shape(source)
        if ways is None or shape is None:
            return None
        rows: list[Span | None] = [None] * len(shape)
        for axis, way in enumerate(ways):
            if way is not None and self.lengths.has(shape[way]):
                rows[way] = spans[axis]
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
        return self.graph.call_function(called(node), (self.whole(source), read))

    # --- sources ---

    def _is_static(self, node: fx.Node) -> bool:
        """Whether the value is read from a table."""
        return self.plan.kind(node) == "position" and node not in self.live and node.op == "call_function"

    def _table(self, node: fx.Node) -> Any:
        if any(not self.lengths.pure(size) for size in (node_shape(node) or ()) if self.lengths.has(size)):
            raise refusal(node, "it depends on the length in a way that cannot be continued")
        if node not in self.tables:
            self.tables.append(node)
        return self.once(("table", node), operator.getitem, self.inputs["tables"], self.tables.index(node))

    def _given(self, node: fx.Node) -> Any:
        """Values per token, up to now."""
        at = self.plan.inputs.history.index(node)
        held = self.once(("history", at), operator.getitem, self.inputs["history"], at)
        return self.narrow(held, 1, 0, self.bounds[ALL][1])


def sized(node: fx.Node) -> Callable[..., Any]:
    """The operator that a reshape of any kind is when all of its sizes are given."""
    if opname(node) in ("expand", "broadcast_to"):
        return torch.ops.aten.expand.default
    return torch.ops.aten.view.default if opname(node) == "view" else torch.ops.aten.reshape.default


def called(node: fx.Node) -> Callable[..., Any]:
    """The function that a node calls."""
    assert callable(node.target)
    return node.target
