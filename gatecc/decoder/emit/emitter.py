"""Emitter: writes the step program, a graph of torch calls with explicit state.

Inputs: tokens (B, T), past, and the tuples ``tables`` (position values at the full capacity), ``slots`` (the state),
``starts`` (the first position that each window's keys hold), ``history`` (values per token, capacity long) and
``context``. Outputs: the logits and the next value of every slot (None where the slot was written in place).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from gatecc.decoder.analysis.axes import ALL, NOW, Span
from gatecc.decoder.analysis.labels import named
from gatecc.decoder.emit import lower
from gatecc.decoder.emit.masks import triangle
from gatecc.decoder.emit.positions import SIZED, Positions, sized
from gatecc.decoder.plan import Plan
from gatecc.decoder.refuse import refusal
from gatecc.decoder.rules import slots as marks
from gatecc.ir.match.axes import permutation
from gatecc.ir.ops import RESHAPES, SHAPE_ONLY, TRANSPOSES, opname
from gatecc.ir.program import shape
from gatecc.ir.sizes import node_shape
from gatecc.ops.linear_attention import linear_attention_step

_FILLS = frozenset("zeros ones full empty".split()) | SHAPE_ONLY
_COMBINE: dict[str, Callable[..., Any]] = {"cumsum": torch.add, "cumprod": torch.mul, "logcumsumexp": torch.logaddexp}


class Emitter(Positions):
    """Writes one step program. ``single``: for exactly one new token. ``live``: position nodes to evaluate in the step
    rather than read from tables.
    """

    def __init__(self, plan: Plan, *, single: bool, live: frozenset[fx.Node] = frozenset()) -> None:
        super().__init__(plan, live)
        self.single = single
        names = ("tokens", "past", "tables", "slots", "starts", "history", "context")
        self.inputs = {name: self.graph.placeholder(name) for name in names}
        past = self.inputs["past"]
        self.batch = self.graph.call_method("size", (self.inputs["tokens"], 0))
        new: Any = 1 if single else self.graph.call_method("size", (self.inputs["tokens"], 1))
        self.bounds = {NOW: (past, new), ALL: (0, self.combine(operator.add, past, new))}
        self.env: dict[fx.Node, Any] = {plan.inputs.tokens: self.inputs["tokens"]}
        self.next: dict[int, Any] = {}
        self._reshaped: dict[fx.Node, fx.Node] = {}  # a reshape that was written, and what it reshapes

    def program(self) -> fx.GraphModule:
        """The step program."""
        skipped = self._folded() if self.single else set[fx.Node]()
        for node in self.plan.nodes:
            if node in self.labels.of and node not in self.env and node not in skipped:
                self.env[node] = self._written(node)
        outputs = tuple(self.next.get(i) for i in range(len(self.plan.slots)))
        self.graph.output((self.env[self.plan.logits], outputs))
        lower.drop_unread_views(self.graph)
        return self.module()

    def _folded(self) -> set[fx.Node]:
        """Repetitions of heads that a single query does not need: its group takes the place of the queries."""
        return {node for a in self.plan.fused.values() if a.plain and a.group for node in a.repeats}

    # --- data nodes ---

    def _written(self, node: fx.Node) -> Any:
        try:
            return self._data(node)
        except ArithmeticError as e:
            raise refusal(node, str(e)) from e

    def _data(self, node: fx.Node) -> Any:
        if node.target in marks.MARKS:
            return self._mark(node)
        if node.op == "get_attr":
            return self.weight(node)
        if node.target is operator.getitem and isinstance(self.env.get(node.all_input_nodes[0]), tuple):
            return self.env[node.all_input_nodes[0]][int(str(node.args[1]))]
        if lower.is_alias(node) and node.args[0] in self.env and node not in self.flow.writers:
            return self.env[node.args[0]]
        if opname(node) == "scaled_dot_product_attention":
            return self._attention(node)
        if opname(node) == "linear_attention" and self.single and self._is_simple(node):
            return self._one_token(node)
        result = self._call(node)
        for source in node.all_input_nodes:
            if source.target in marks.STATES:
                index = int(str(source.args[-1]))
                output = self.plan.slots[index].output
                self.next[index] = self.graph.call_function(operator.getitem, (result, output))
        return result

    def _call(self, node: fx.Node) -> fx.Node:
        name = opname(node)
        if name in RESHAPES | TRANSPOSES:
            laid = self._laid_out(node)
            if laid is not None:
                return laid
        if name in SIZED:
            return lower.call(self.graph, sized(node), (self._read(node, node.args[0]), self._shape(node)), {})
        if name in _FILLS and not isinstance(node.target, str):
            return self.filled(node, self._shape(node))
        span = NOW if name == "arange" else None
        if name == "slice":
            axis = int(named(node, "dim", 0))
            span = self.labels.of.get(node.all_input_nodes[0], (None,))[axis]
            bounds = slice_bounds(node)
            if bounds is not None:
                return self.narrow(self._read(node, node.args[0]), axis, bounds[0], bounds[1] - bounds[0])
        args = map_aggregate(node.args, lambda x: self._read(node, x, span))
        kwargs = map_aggregate(node.kwargs, lambda x: self._read(node, x, span))
        return lower.call(self.graph, node.target, args, kwargs)

    def _laid_out(self, node: fx.Node) -> fx.Node | None:
        """One reshape in the place of a chain of reshapes and of transposes that move no more than axes of size 1.

        None where elements change their order, or where a write in place needs the view itself.
        """
        source = node.all_input_nodes[0]
        if source not in self.env or self.flow.writers.get(self.flow.base[node]):
            return None
        if opname(node) in TRANSPOSES:
            before = self._shape(source)
            order = permutation(node, len(before))
            moved = None if order is None else [axis for axis in order if before[axis] != 1]
            if moved is None or moved != sorted(moved):
                return None
        read: fx.Node = self.env[source]
        first = self._reshaped.get(read, read)
        made = self.graph.call_method("reshape", (first, self._shape(node)))
        self._reshaped[made] = first
        return made

    def _shape(self, node: fx.Node) -> list[Any]:
        spans = self.labels.of[node]
        return [self.size(size, span) for size, span in zip(node_shape(node) or (), spans, strict=True)]

    def _read(self, node: fx.Node, x: Any, span: Span | None = None) -> Any:
        """An argument of a data node as the step has it."""
        if not isinstance(x, fx.Node):
            return x
        if x in self.env:
            return self.env[x]
        if self.plan.kind(x) == "size":
            if self.lengths.has(x.meta["val"]) and span is None:
                raise refusal(node, "it uses the length as a number")
            return self.size(x.meta["val"], span)
        spans = self.labels.cuts.get(node, {}).get(x)
        return self.value(x, spans or (None,) * len(node_shape(x) or ()))

    # --- marks ---

    def _mark(self, node: fx.Node) -> Any:
        index = int(str(node.args[-1]))
        slot = self.plan.slots[index]
        held = self.graph.call_function(operator.getitem, (self.inputs["slots"], index))
        if node.target is marks.recalled:
            return held
        if node.target is marks.resumed:
            start = self._read(node, node.args[0])
            return self.graph.call_function(first, (self.bounds[NOW][0], start, held))
        x = self.env[node.all_input_nodes[0]]
        if node.target is marks.kept:
            return self._keep(held, x, slot.axis, slot.span)
        new = self.bounds[NOW][1]
        if node.target in (marks.extended, marks.delayed):
            longer = self.graph.call_function(torch.cat, ([held, x], slot.axis))
            self.next[index] = self._alone(self.narrow(longer, slot.axis, new, slot.count))
            return longer if node.target is marks.extended else self.narrow(longer, slot.axis, 0, new)
        total = self.graph.call_function(_COMBINE[opname(slot.node)], (x, held))
        self.next[index] = self._alone(self.narrow(total, slot.axis, self.combine(operator.sub, new, 1), 1))
        return total

    def _alone(self, part: fx.Node) -> fx.Node:
        """A part of many positions in memory of its own: as a view it would keep all of them alive."""
        return part if self.single else self.graph.call_method("clone", (part,))

    def _keep(self, held: Any, x: Any, axis: int, span: Span) -> Any:
        """Write the new keys behind the old ones, and yield those of the span."""
        (first, new), (start, count) = self.bounds[NOW], self.bound(span)
        if span.window is not None:
            at = self.plan.windows.index(span.window)
            offset = self.once(("start", at), operator.getitem, self.inputs["starts"], at)
            first = self.combine(operator.sub, first, offset)
            start = self.combine(operator.sub, start, offset)
        self.graph.call_method("copy_", (self.narrow(held, axis, first, new), x))
        return self.narrow(held, axis, start, count)

    # --- linear attention ---

    def _is_simple(self, node: fx.Node) -> bool:
        plain = named(node, "mask") is None and not named(node, "normalize")
        return plain and named(node, "gate_normalizer") is None

    def _one_token(self, node: fx.Node) -> tuple[Any, Any]:
        """linear_attention for one token: the step kernel on a copy of the state. -> (o, state)"""
        held = self.graph.call_method("clone", (self._read(node, node.args[5]),))
        read = [self._read(node, x) for x in node.args[:5]]
        taken = [self.graph.call_method("select", (x, 2, 0)) if isinstance(x, fx.Node) else None for x in read]
        o = self.graph.call_function(linear_attention_step, (*taken, held), {"scale": named(node, "scale")})
        start = next(n for n in node.all_input_nodes if n.target in marks.STATES)
        self.next[int(str(start.args[-1]))] = held
        return self.graph.call_method("unsqueeze", (o, 2)), held

    def _attention(self, node: fx.Node) -> Any:
        found = self.plan.fused.get(node)
        args, kwargs = list(node.args), dict(node.kwargs)
        plain = self.single and found is not None and found.plain
        if plain or named(node, "is_causal", False):
            args[3:] = [None, *args[4:5], False]
        if found is not None and plain and found.group:
            return self._grouped(node, args, kwargs, found.group)
        read = [self._read(node, x) for x in args]
        if named(node, "is_causal", False) and not plain:
            span = ALL if found is None else self.plan.slots[int(str(found.keys.args[1]))].span
            read[3] = self._triangle(span, read[0])
        return lower.call(self.graph, node.target, tuple(read), {k: self._read(node, v) for k, v in kwargs.items()})

    def _triangle(self, span: Span, like: Any) -> Any:
        (past, new), (start, _) = self.bounds[NOW], self.bound(span)
        return self.once(("triangle", span), triangle, past, new, start, like)

    def _grouped(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any], group: int) -> Any:
        """One query per head: the heads that share a key head lie side by side, as if they were queries of it."""
        found = self.plan.fused[node]
        q = self._read(node, args[0])
        k, v = self.env[found.keys], self.env[found.values]
        if group == 1:
            return lower.call(self.graph, node.target, (q, k, v, *args[3:]), kwargs)
        q_shape, k_shape, v_shape = (shape(n) for n in (args[0], found.keys, found.values))
        q = self.graph.call_method("reshape", (q, [self.batch, k_shape[1], group, q_shape[3]]))
        out = lower.call(self.graph, node.target, (q, k, v, *args[3:]), kwargs)
        made = self.graph.call_method("reshape", (out, [self.batch, q_shape[1], 1, v_shape[3]]))
        self._reshaped[made] = out
        return made


def table_program(plan: Plan, tables: Sequence[fx.Node]) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    """The program that evaluates position nodes for a whole capacity: (batch, length) -> a tuple of tensors."""
    positions = [node for node, kind in plan.kinds.of.items() if kind == "position"]
    writer = Positions(plan, frozenset(positions))
    writer.batch = writer.graph.placeholder("batch")
    writer.bounds = {ALL: (0, writer.graph.placeholder("length"))}
    writer.graph.output(tuple(writer.whole(node) for node in tables))
    return writer.module(), writer.weights


def first(past: int, start: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """The state that an operator starts from: its own before the first token, then what was held."""
    return held if past else start.to(held.dtype)


def slice_bounds(node: fx.Node) -> tuple[int, int] | None:
    """Start and end of a slice of step 1 along an axis of known size; None for any other."""
    size = shape(node.all_input_nodes[0])[int(named(node, "dim", 0))]
    bounds = named(node, "start"), named(node, "end")
    known = all(x is None or isinstance(x, int) for x in bounds)
    if not isinstance(size, int) or not known or named(node, "step", 1) != 1:
        return None
    start, end, _ = slice(*bounds).indices(size)
    return start, max(start, end)
