"""AttentionWriter: writes fused attention with its keys and values in slots."""

from __future__ import annotations

from typing import Any

from torch import fx

from gatecc.decoder.analysis.axes import ALL, NOW, Span
from gatecc.decoder.emit import lower
from gatecc.decoder.emit.masks import triangle
from gatecc.decoder.emit.operands import Operands
from gatecc.ir.ops import named
from gatecc.ir.program import shape


class AttentionWriter:
    """``single``: the step is for exactly one new token."""

    def __init__(self, operands: Operands, *, single: bool) -> None:
        self.operands, self.single = operands, single
        self.writer, self.plan = operands.writer, operands.plan

    def folded(self) -> set[fx.Node]:
        """The repetitions of heads that are not written: see ``_grouped``."""
        found = self.plan.fused.values() if self.single else ()
        return {node for a in found if a.plain and a.group for node in a.repeats}

    def attention(self, node: fx.Node) -> Any:
        """A call of scaled_dot_product_attention."""
        found = self.plan.fused.get(node)
        args, kwargs = list(node.args), dict(node.kwargs)
        plain = self.single and found is not None and found.plain
        if plain or named(node, "is_causal", False):
            args[3:] = [None, *args[4:5], False]
        if found is not None and plain and found.group:
            return self._grouped(node, args, kwargs, found.group)
        read = [self.operands.read(node, x) for x in args]
        if named(node, "is_causal", False) and not plain:
            span = ALL if found is None else self.plan.slots[int(str(found.keys.args[1]))].span
            read[3] = self._triangle(span, read[0])
        options = {k: self.operands.read(node, v) for k, v in kwargs.items()}
        return lower.call(self.writer.graph, node.target, tuple(read), options)

    def _triangle(self, span: Span, like: Any) -> Any:
        (past, new), (start, _) = self.operands.numbers.bounds[NOW], self.operands.numbers.bound(span)
        graph = self.writer.graph
        return self.writer.once(("triangle", span), lambda: graph.call_function(triangle, (past, new, start, like)))

    def _grouped(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any], group: int) -> Any:
        """One query per head: the heads that share a key head lie side by side, as if they were queries of it."""
        found, env, graph = self.plan.fused[node], self.operands.env, self.writer.graph
        q = self.operands.read(node, args[0])
        k, v = env[found.keys], env[found.values]
        if group == 1:
            return lower.call(graph, node.target, (q, k, v, *args[3:]), kwargs)
        q_shape, k_shape, v_shape = (shape(n) for n in (args[0], found.keys, found.values))
        batch = self.operands.numbers.batch
        q = graph.call_method("reshape", (q, [batch, k_shape[1], group, q_shape[3]]))
        out = lower.call(graph, node.target, (q, k, v, *args[3:]), kwargs)
        return self.operands.note_reshape(out, [batch, q_shape[1], 1, v_shape[3]])
