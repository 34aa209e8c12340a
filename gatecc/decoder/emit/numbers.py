"""Numbers: the arithmetic of a step, on the sizes of its tensors and on the bounds of the positions that they hold."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from gatecc.decoder.analysis.axes import ALL, NOW, Span
from gatecc.decoder.emit.sources import Sources
from gatecc.decoder.emit.writer import GraphWriter
from gatecc.ir.sizes import expression, node_shape

Number = Any  # an int, or the node that holds one
_ARITHMETIC: dict[Any, Callable[..., Any]] = {sympy.Add: operator.add, sympy.Mul: operator.mul}


class Numbers:
    """``bounds``: the first position and the number of positions of each span; ``batch``: the number of samples."""

    def __init__(self, writer: GraphWriter, sources: Sources, batch: Number) -> None:
        self.writer, self.sources, self.batch = writer, sources, batch
        self.lengths = writer.plan.lengths
        self.bounds: dict[Span, tuple[Number, Number]] = {}

    def combine(self, function: Callable[..., Any], one: Number, other: Number) -> Number:
        """Arithmetic on two numbers, done at once where both are known."""
        if not isinstance(one, fx.Node) and not isinstance(other, fx.Node):
            return function(one, other)
        if function in (operator.add, operator.sub) and isinstance(other, int) and other == 0:
            return one
        if function is operator.mul and 1 in (one, other):
            return other if one == 1 else one
        return self.writer.once((function, one, other), lambda: self.writer.call(function, (one, other)))

    def bound(self, span: Span) -> tuple[Number, Number]:
        """The first position of a span and how many it has."""
        if span not in self.bounds:
            assert span.window is not None
            past, _ = self.bounds[NOW]
            start = self.combine(torch.sym_max, self.combine(operator.add, past, 1 - span.window), 0)
            self.bounds[span] = start, self.combine(operator.sub, self.bounds[ALL][1], start)
        return self.bounds[span]

    def size(self, size: Any, span: Span | None) -> Number:
        """A size of the captured graph, with the number of positions of ``span`` in the place of the length.

        Raises ArithmeticError if it cannot be written out.
        """
        return size if isinstance(size, int) else self._number(expression(size), span)

    def _number(self, found: Any, span: Span | None) -> Number:
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
        function = _ARITHMETIC.get(found.func) or {"Max": torch.sym_max, "Min": torch.sym_min}.get(type(found).__name__)
        if function is None or not operands:
            raise ArithmeticError(f"the size {found} cannot be written out")
        result = operands[0]
        for operand in operands[1:]:
            result = self.combine(function, result, operand)
        return result

    def _measured(self, symbol: sympy.Symbol) -> fx.Node:
        """The length of a context, taken from a tensor of that length."""
        for node, given in self.sources.context.items():
            sizes = [expression(size) for size in node_shape(node) or ()]
            if symbol in sizes:
                return self.writer.size(given, sizes.index(symbol))
        raise ArithmeticError(f"the size {symbol} is that of no input")
