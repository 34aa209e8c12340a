"""Taking off the repetition of key and value heads (grouped-query attention)."""

from __future__ import annotations

from torch import fx

from gatecc.ir.ops import RESHAPES, argument, opname
from gatecc.ir.sizes import Size, node_shape, numel, same

_FAR = 1 << 40


def unexpanded(node: fx.Node, axes: str) -> fx.Node | None:
    """The tensor with one head per group behind one with a head per query; None if ``node`` repeats no heads.

    Recognised: repeat_interleave on the head axis, expand of a single head, and reshape(expand(unsqueeze(x))).
    A tiling ``repeat`` is left alone: it pairs heads in another order.
    """
    if "h" not in axes or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    at, name, source = axes.index("h"), opname(node), node.args[0]
    shape, into = node_shape(node), node_shape(source)
    if shape is None or into is None:
        return None
    if name == "repeat_interleave" and len(into) == len(shape) and argument(node, 2, "dim") in (at, at - len(shape)):
        return source
    if name == "expand" and len(into) == len(shape) and _differ_only(shape, into, at) and same(into[at], 1):
        return source
    if is_identity(node) and same(shape[at], into[at]):
        return unexpanded(source, axes)
    if name in RESHAPES and len(into) == len(shape) + 1:
        return _grouped(source, shape, at)
    return None


def _differ_only(one: tuple[Size, ...], other: tuple[Size, ...], at: int) -> bool:
    return all(i == at or same(a, b) for i, (a, b) in enumerate(zip(one, other, strict=True)))


def _grouped(node: fx.Node, shape: tuple[Size, ...], at: int) -> fx.Node | None:
    """From (b, kv, r, n, d) back over expand, slices and unsqueeze to (b, kv, n, d)."""
    wide = node_shape(node) or ()
    merged = numel(wide[at : at + 2])
    if merged != numel(shape[at : at + 1]) or not all(map(same, wide[at + 2 :], shape[at + 1 :])):
        return None
    expanded = False
    for _ in range(12):
        name = opname(node)
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        if name == "unsqueeze":
            dim = int(argument(node, 1, "dim")) % len(wide)
            return source if expanded and dim == at + 1 else None
        if name == "expand":
            expanded = True
        elif not is_identity(node) and name not in ("contiguous", "clone"):
            return None
        node = source
    return None


def is_identity(node: fx.Node) -> bool:
    """Whether a node is a slice of everything."""
    if opname(node) != "slice":
        return False
    start, end, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    return start in (None, 0) and (end is None or (isinstance(end, int) and end > _FAR)) and step == 1
