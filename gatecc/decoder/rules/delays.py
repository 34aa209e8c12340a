"""Step rule of delays: a tensor moved to later positions, with a constant before its first one.

Written as a padding on the left and a cut on the right, in one operator or several, in any order: ``pad(x, (W, 0))``
cut to the length of x, ``pad(x, (W, -W))``, zeros put before ``x[:, :-W]``. The state holds the last W values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from gatecc.decoder.analysis.axes import Lengths
from gatecc.decoder.rules.slots import Slot, delayed
from gatecc.ir.ops import SAME_SHAPE, argument, opname
from gatecc.ir.program import META, origin
from gatecc.ir.sizes import Size, expression, node_shape, same

_PADS = frozenset(("pad", "constant_pad_nd"))
_CUTS = frozenset(("slice", "narrow"))
_CATS = frozenset("cat concat concatenate".split())
_FILLS = {"zeros": 0.0, "new_zeros": 0.0, "zeros_like": 0.0, "ones": 1.0, "new_ones": 1.0, "ones_like": 1.0}
SHIFTS = _PADS | _CUTS | _CATS


@dataclass(frozen=True, eq=False)
class Shifted:
    """Along one axis: ``front`` constants, then ``source`` without its first and last ``lost`` values, then ``back``
    constants. ``padded``: constants were put in somewhere, and may have been cut off again.
    """

    source: fx.Node
    front: int = 0
    back: int = 0
    lost: tuple[int, int] = (0, 0)
    fill: float | None = None
    padded: bool = False

    @property
    def delays(self) -> bool:
        """Whether it is the source moved to later places, as far as its length allows."""
        return self.padded and not self.back and not self.lost[0] and self.lost[1] == self.front

    def cut(self, front: int, back: int) -> Shifted:
        """Without this many values at either end."""
        constants = min(self.front, front), min(self.back, back)
        lost = self.lost[0] + front - constants[0], self.lost[1] + back - constants[1]
        return replace(self, front=self.front - constants[0], back=self.back - constants[1], lost=lost)

    def pad(self, front: int, back: int, fill: float) -> Shifted | None:
        """With constants at either end; None if there are others already."""
        if self.fill not in (None, fill) and (self.front or self.back):
            return None
        return replace(self, front=self.front + front, back=self.back + back, fill=fill, padded=True)


def delay(node: fx.Node, slots: list[Slot], lengths: Lengths) -> None:
    """Let a delay along the positions read its values from a slot; any other node stays as it is."""
    for axis, size in enumerate(node_shape(node) or ()):
        if not lengths.pure(size):
            continue
        found = _read(node, axis)
        source = found.source
        if source is node or not found.delays or source.meta["val"].dtype != node.meta["val"].dtype:
            continue
        if not same((node_shape(source) or ())[axis], size):
            continue
        node.replace_all_uses_with(_mark(node, found, axis, slots) if found.front else source)
        return


def _mark(node: fx.Node, found: Shifted, axis: int, slots: list[Slot]) -> fx.Node:
    fill = found.fill or 0.0
    slots.append(Slot("taps", found.source, axis, count=found.front, fill=fill, owner=origin(node).owner))
    with node.graph.inserting_before(node):
        mark = node.graph.call_function(delayed, (found.source, len(slots) - 1))
    mark.meta = {"val": found.source.meta["val"], META: node.meta.get(META)}
    return mark


def _read(node: fx.Node, axis: int) -> Shifted:
    """A tensor as a shifted one; where it is not made by padding and cutting, its own source."""
    name = opname(node)
    source = node.args[0] if node.args else None
    found = None
    if name in _CATS:
        found = _joined(node, axis)
    elif not isinstance(source, fx.Node):
        return Shifted(node)
    elif name in _PADS:
        found = _padded(node, source, axis)
    elif name in _CUTS:
        found = _cut(node, source, axis)
    elif name in SAME_SHAPE:
        found = _read(source, axis)
    return found or Shifted(node)


def _padded(node: fx.Node, source: fx.Node, axis: int) -> Shifted | None:
    """A padding, whose negative numbers cut."""
    pad = list(argument(node, 1, "pad"))
    at = 2 * (len(node_shape(source) or ()) - 1 - axis)
    front, back = pad[at : at + 2] if at + 1 < len(pad) else (0, 0)
    others = [*pad[:at], *pad[at + 2 :]]
    value = argument(node, 3 if opname(node) == "pad" else 2, "value", 0) or 0
    constant = opname(node) != "pad" or argument(node, 2, "mode", "constant") == "constant"
    if any(others) or not constant or not all(isinstance(x, int) for x in (front, back, *others)):
        return None
    if not isinstance(value, int | float):
        return None
    return _read(source, axis).cut(max(0, -front), max(0, -back)).pad(max(0, front), max(0, back), float(value))


def _cut(node: fx.Node, source: fx.Node, axis: int) -> Shifted | None:
    before, after = node_shape(source) or (), node_shape(node) or ()
    if int(argument(node, 1, "dim", 0)) % len(before) != axis:
        return _read(source, axis) if all(map(same, before, after)) else None
    start = argument(node, 2, "start") or 0
    gone = _number(before[axis], after[axis])
    if not isinstance(start, int) or start < 0 or gone is None or gone < start:
        return None
    if opname(node) == "slice" and argument(node, 4, "step", 1) != 1:
        return None
    return _read(source, axis).cut(start, gone - start)


def _number(one: Size, other: Size) -> int | None:
    """How much larger one size is, if that does not depend on the length."""
    found = expression(one) - expression(other)
    return int(found) if found.is_Integer else None


def _joined(node: fx.Node, axis: int) -> Shifted | None:
    """One tensor with constants before or behind it."""
    parts = list(argument(node, 0, "tensors"))
    if int(argument(node, 1, "dim", 0)) % len(node_shape(node) or ()) != axis:
        return None
    fills = [_constant(part) for part in parts]
    if fills.count(None) != 1:
        return None
    at = fills.index(None)
    widths = [(node_shape(part) or ())[axis] for i, part in enumerate(parts) if i != at]
    values = {fill for fill in fills if fill is not None}
    if len(values) != 1 or not all(isinstance(width, int) for width in widths):
        return None
    front = sum(int(width) for width in widths[:at])
    return _read(parts[at], axis).pad(front, sum(map(int, widths)) - front, values.pop())


def _constant(node: fx.Node) -> float | None:
    """The number that a tensor is filled with, None if it is no constant."""
    name = opname(node)
    if name in ("full", "full_like", "new_full"):
        value = argument(node, 2 if name == "new_full" else 1, "fill_value")
        return float(value) if isinstance(value, int | float) else None
    return _FILLS.get(name)
