"""Operands: what the data nodes of a step read."""

from __future__ import annotations

from typing import Any

from torch import fx

from gatecc.decoder.analysis.axes import Span
from gatecc.decoder.emit.positions import PositionWriter
from gatecc.decoder.refuse import refusal
from gatecc.ir.sizes import node_shape


class Operands:
    """``env``: what was written for the data nodes of the captured graph so far."""

    def __init__(self, positions: PositionWriter, tokens: fx.Node) -> None:
        self.positions, self.numbers, self.writer = positions, positions.numbers, positions.writer
        self.plan = positions.plan
        self.env: dict[fx.Node, Any] = {self.plan.inputs.tokens: tokens}

    def read(self, node: fx.Node, x: Any, span: Span | None = None) -> Any:
        """An argument of a data node as the step has it. ``span``: what an argument that is the length counts."""
        if not isinstance(x, fx.Node):
            return x
        if x in self.env:
            return self.env[x]
        if self.plan.depends_on(x) == "size":
            if self.plan.lengths.has(x.meta["val"]) and span is None:
                raise refusal(node, "it uses the length as a number")
            return self.numbers.size(x.meta["val"], span)
        spans = self.plan.labels.cuts.get(node, {}).get(x)
        return self.positions.value(x, spans or (None,) * len(node_shape(x) or ()))

    def shape(self, node: fx.Node) -> list[Any]:
        """The shape of a data node in the step."""
        spans = self.plan.labels.of[node]
        return [self.numbers.size(size, span) for size, span in zip(node_shape(node) or (), spans, strict=True)]
