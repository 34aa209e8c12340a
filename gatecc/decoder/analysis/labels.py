"""Labels: the positions that each axis of each data node runs over in a step. Nodes that mix positions are found here.

A forward sweep. Data starts at the tokens with NOW; a mark turns its axis into ALL or a window; every operator has a
transfer rule: how axes go through it (transfer.py). Operators that would combine values along NOW are refused, because
they see less in a step than in the full sequence. Position and live operands get the rows that they are cut to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from gatecc.decoder.analysis.axes import NOW, Span, Spans
from gatecc.decoder.analysis.dependence import Dependence
from gatecc.decoder.refuse import refusal
from gatecc.decoder.rules import slots as marks
from gatecc.decoder.rules.slots import Slot
from gatecc.ir.ops import opname
from gatecc.ir.sizes import node_shape

CUT = ("position", "live")  # nodes that depend on these are cut to rows where they meet data

Rule = Callable[["Labels", fx.Node], Any]


class Labels:
    """``of[node]``: the spans of a data node's axes (a list of them for a node with several outputs).

    ``cuts[node][operand]``: the spans that a position or live operand of a data node is read at.
    """

    def __init__(
        self,
        dependence: Dependence,
        slots: Sequence[Slot],
        nodes: Iterable[fx.Node],
        rule: Callable[[fx.Node], Rule | None],
    ) -> None:
        self.slots, self.lengths, self._rule = slots, dependence.lengths, rule
        self.depends_on = dependence.of
        self.of: dict[fx.Node, Any] = {}
        self.cuts: dict[fx.Node, dict[fx.Node, Spans]] = {}
        for node in nodes:
            if self.depends_on(node) != "data" or opname(node).startswith("_assert"):
                continue
            self.of[node] = self._label(node)
            for spans in self._outputs(node):
                if sum(span is NOW or span == NOW for span in spans) > 1:
                    raise refusal(node, "it compares positions with positions, and is no attention that is known")

    def _outputs(self, node: fx.Node) -> list[Spans]:
        found = self.of[node]
        return found if isinstance(found, list) else [found]

    def _label(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.spread(node, NOW)
        if node.target in marks.MARKS:
            return self._mark(node)
        rule = self._rule(node)
        if rule is None:
            return self._unknown(node)
        return rule(self, node)

    def _unknown(self, node: fx.Node) -> Any:
        if any(span is not None for source in self.data(node) for out in self._outputs(source) for span in out):
            raise refusal(node, "it may mix positions, and has no step rule")
        return self.spread(node, None)

    def _mark(self, node: fx.Node) -> Any:
        if node.target is marks.recalled:
            return self.spread(node, None)
        source, slot = node.args[0], self.slots[int(str(node.args[1]))]
        assert isinstance(source, fx.Node)
        if node.target is marks.resumed:
            if self.depends_on(source) not in ("position", "context") or self.lengths.axes(source):
                raise refusal(slot.node, f"it starts from a state, {source.name}, that depends on the tokens")
            return self.spread(node, None)
        if self.depends_on(source) != "data":
            raise refusal(source, "keys or values that do not depend on the tokens")
        if node.target is marks.kept:
            return tuple(slot.span if i == slot.axis else span for i, span in enumerate(self.of[source]))
        return self.of[source]

    # --- helpers of the rules ---

    def data(self, node: fx.Node) -> list[fx.Node]:
        """The data operands."""
        return [n for n in node.all_input_nodes if n in self.of]

    def spread(self, node: fx.Node, span: Span | None) -> Any:
        """Every axis of the output that depends on the length gets ``span``."""
        held = node.meta.get("val")
        if isinstance(held, list | tuple):
            return [self._of_shape(x.shape, span) if isinstance(x, torch.Tensor) else () for x in held]
        return self._of_shape(held.shape, span) if isinstance(held, torch.Tensor) else ()

    def _of_shape(self, shape: Sequence[Any], span: Span | None) -> Spans:
        return tuple(span if self.lengths.has(size) else None for size in shape)

    def only(self, node: fx.Node) -> Span | None:
        """The one span of all data operands. Raises DecoderError if there are several."""
        found = {s for source in self.data(node) for out in self._outputs(source) for s in out if s is not None}
        if len(found) > 1:
            raise refusal(node, f"the positions of its operands differ ({', '.join(sorted(map(str, found)))})")
        return found.pop() if found else None

    def one(self, node: fx.Node) -> Any:
        """The labels of a node whose operands all run over the same positions."""
        for source in node.all_input_nodes:
            self._cut_alike(node, source)
        return self.spread(node, self.only(node) or NOW)

    def _cut_alike(self, node: fx.Node, source: fx.Node) -> None:
        if self.depends_on(source) in CUT and self.lengths.axes(source):
            span = self.only(node) or NOW
            self.cut(node, source, self.spread(source, span))

    def cut(self, node: fx.Node, source: fx.Node, spans: Spans) -> None:
        """Note the rows at which a position operand is read."""
        before = self.cuts.setdefault(node, {}).setdefault(source, spans)
        if before != spans:
            raise refusal(node, f"it reads {source.name} at different positions")

    def along(self, node: fx.Node, source: fx.Node, out: Sequence[Span | None]) -> Spans:
        """The spans of an operand that is broadcast against ``out``."""
        shape = node_shape(source) or ()
        shift = len(out) - len(shape)
        return tuple(out[i + shift] if self.lengths.has(size) else None for i, size in enumerate(shape))

    def forbid(self, node: fx.Node, source: fx.Node, axis: int, flat: bool = False) -> None:
        """Refuse to combine values along NOW. With ``flat``, flattened tokens may be sorted and counted."""
        spans = self.of.get(source)
        if not isinstance(spans, tuple) or spans[axis] != NOW:
            return
        if flat and not self.lengths.pure((node_shape(source) or ())[axis]):
            return
        raise refusal(node, "it mixes positions, and has no step rule")
