"""A further logit of a softmax, which belongs to no key: a column joined to the scores, and cut off the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import argument, opname
from gatecc.ir.sizes import expression, node_shape
from gatecc.passes.lower.attention.atoms import Cuts, Group, Layout
from gatecc.passes.lower.attention.numbers import filling

_REPEATING = frozenset(("expand", "expand_as", "broadcast_to", "repeat"))


@dataclass(frozen=True, eq=False)
class Sinks:
    """``node`` has a logit for each place of its layout; without a node they are all ``number``. ``at``: the place of
    the column beside the keys, 0 or -1."""

    node: fx.Node | None
    layout: Layout
    number: float
    at: int

    @property
    def atoms(self) -> set[object]:
        """The axes along which they are others."""
        return {atom for group in self.layout for atom in group}

    def now(self, cuts: Cuts) -> Sinks:
        """The same in atoms that are not cut."""
        return replace(self, layout=cuts.layout(self.layout))


def joined(node: fx.Node, scores: fx.Node, layout: Layout, keys: Group, flow: Flow) -> Sinks | str:
    """What ``node`` joins to scores of a layout; or why that is no logit for each head."""
    parts = node.args[0] if opname(node) == "cat" else None
    if not isinstance(parts, Sequence) or len(parts) != 2 or (parts[0] is scores) == (parts[1] is scores):
        return "something else than one logit is joined to the scores"
    first = parts[1] is scores
    one = parts[0 if first else 1]
    axis = int(argument(node, 1, "dim", 0)) % len(layout)
    if not isinstance(one, fx.Node) or layout[axis] != keys or not _is_one((node_shape(one) or (0,) * 9)[axis]):
        return "something else than one logit is joined to the scores"
    at = 0 if first else -1
    while opname(one) in _REPEATING and isinstance(one.args[0], fx.Node) and _broadcasts(one.args[0], one):
        one = one.args[0]
    number = filling(one, flow)
    if number is not None:
        return Sinks(None, (), number, at)
    shape = node_shape(one) or ()
    padded = (1,) * (len(layout) - len(shape)) + tuple(shape)
    return Sinks(one, tuple(() if _is_one(s) else g for s, g in zip(padded, layout, strict=True)), 0.0, at)


def cut_off(node: fx.Node, source: fx.Node, axis: int, sinks: Sinks) -> bool:
    """Whether a slice takes the column off the weights, and nothing else."""
    shape, before, start = node_shape(node), node_shape(source), argument(node, 2, "start", 0)
    if opname(node) not in ("slice", "narrow") or shape is None or before is None or argument(node, 4, "step", 1) != 1:
        return False
    if int(argument(node, 1, "dim", 0)) % len(shape) != axis:
        return False
    return expression(shape[axis]) == expression(before[axis]) - 1 and start in ((1,) if sinks.at == 0 else (0, None))


def _broadcasts(source: fx.Node, node: fx.Node) -> bool:
    """Whether a node repeats axes of size 1 alone."""
    narrow, wide = node_shape(source), node_shape(node)
    if narrow is None or wide is None:
        return False
    pairs = zip(narrow, wide[len(wide) - len(narrow) :], strict=True)
    return all(_is_one(a) or expression(a) == expression(b) for a, b in pairs)


def _is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1


__all__ = ["Sinks", "cut_off", "joined"]
