"""AttentionWriter: writes fused attention, whose keys and values come from slots."""

from __future__ import annotations

import torch
from torch import fx

from gatecc.decoder.analysis.axes import ALL, NOW, Span
from gatecc.decoder.emit.operands import Operands
from gatecc.ir.ops import named

_aten = torch.ops.aten


class AttentionWriter:
    """``single``: the step is for exactly one new token."""

    def __init__(self, operands: Operands, *, single: bool) -> None:
        self.operands, self.single = operands, single
        self.writer, self.plan = operands.writer, operands.plan

    def write(self, node: fx.Node) -> fx.Node:
        """A call of scaled_dot_product_attention.

        One token takes no mask where it is proved to hide nothing from the newest position.
        """
        found = self.plan.fused.get(node)
        args, kwargs = list(node.args), dict(node.kwargs)
        plain = self.single and found is not None and found.plain
        causal = bool(named(node, "is_causal", False))
        if plain or causal:
            args[3:] = [None, *args[4:5], False]
        read = [self.operands.read(node, x) for x in args]
        if causal and not plain:
            span = ALL if found is None else self.plan.slots[int(str(found.keys.args[1]))].span
            read[3] = self._causal(span, node.meta["val"].device)
        options = {k: self.operands.read(node, v) for k, v in kwargs.items()}
        return self.writer.call(_aten.scaled_dot_product_attention.default, tuple(read), options)

    def _causal(self, span: Span, device: torch.device) -> fx.Node:
        """Which keys of a span the new positions see: no later one, and none before the window. -> (new, keys) bool"""
        return self.writer.once(("causal", span, device), lambda: self._mask(span, device))

    def _mask(self, span: Span, device: torch.device) -> fx.Node:
        call, options, numbers = self.writer.call, {"device": device}, self.operands.numbers
        (past, _), (start, _), (_, end) = numbers.bounds[NOW], numbers.bound(span), numbers.bounds[ALL]
        queries = call(_aten.unsqueeze.default, (call(_aten.arange.start, (past, end), options), 1))
        keys = call(_aten.arange.start, (start, end), options)
        seen = call(_aten.le.Tensor, (keys, queries))
        if span.window is None:
            return seen
        first = call(_aten.sub.Tensor, (queries, span.window))
        return call(_aten.logical_and.default, (seen, call(_aten.gt.Tensor, (keys, first))))
