"""Scores that are mixed between heads before the softmax: talking heads. Looked for to say so, not to rewrite them."""

from __future__ import annotations

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.attention.scores import computed_sides
from gatecc.ir.match.axes import axis_before, tensor_source
from gatecc.ir.match.product import product
from gatecc.ir.ops import CONTRACTIONS, argument, opname
from gatecc.ir.sizes import node_shape

_REDUCTIONS = frozenset("sum mean amax".split())
_STEPS = 24


def mixing(start: fx.Node, axis: int, flow: Flow) -> fx.Node | None:
    """What mixes the products of queries and keys behind the input of a softmax over ``axis``; None if nothing does."""
    node, at, mixer = start, axis % (len(node_shape(start) or ()) or 1), None
    for _ in range(_STEPS):
        name = opname(node)
        if name in CONTRACTIONS:
            found = product(node)
            if found is not None and computed_sides(found, flow) == 2:
                letter = found.axes[at]
                return mixer if (letter in found.left_axes) != (letter in found.right_axes) else None
            mixer = mixer or node
        elif name in _REDUCTIONS | {"cumsum"}:
            mixer = mixer or node
        stepped = _before(node, at)
        if stepped is None:
            return None
        node, at = stepped
    return None


def _before(node: fx.Node, at: int) -> tuple[fx.Node, int] | None:
    """The computed value that a node was made of, and where its axis was."""
    name, source = opname(node), tensor_source(node)
    if source is None or node_shape(source) is None:
        return None
    if name.startswith("conv"):
        return (source, at) if at >= 2 else None
    if name in CONTRACTIONS:
        found = product(node)
        sides = [] if found is None else [(found.left, found.left_axes), (found.right, found.right_axes)]
        letter = "" if found is None else found.axes[at]
        return next(((one, axes.index(letter)) for one, axes in sides if letter in axes and len(axes) > 2), None)
    if name in _REDUCTIONS:
        return source, _unreduced(node, source, at)
    before = axis_before(node, source, at)
    return None if before is None else (source, before)


def _unreduced(node: fx.Node, source: fx.Node, at: int) -> int:
    rank, dims = len(node_shape(source) or ()), argument(node, 1, "dim")
    gone = {int(d) % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))}
    kept = [i for i in range(rank) if i not in gone]
    return at if argument(node, 2, "keepdim", False) else kept[at]
