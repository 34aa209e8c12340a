"""Step rule of attention with a deferred softmax: its weights are exp(scores), and are normalised later, if at all.

``exp(q k' - largest) v`` is divided by a sum only after something else was added to it: in LoLCATs linear attention to
the keys before a window. Keys and values are kept as those of any attention.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from gatecc.decoder.analysis.axes import Lengths
from gatecc.decoder.rules.attention import causal_span, keep
from gatecc.decoder.rules.slots import Slot
from gatecc.ir.dataflow import Flow
from gatecc.ir.match.attention.scores import Scores, find_scores, unshifted
from gatecc.ir.match.attention.values import WeightedSum, find_values
from gatecc.ir.match.mask.evaluate import MaskClassifier, MaskGraph
from gatecc.ir.ops import CASTS, VIEWS, opname
from gatecc.ir.program import origin
from gatecc.ir.sizes import Size, node_shape, numel

_EDITS = frozenset("mul where masked_fill".split())


def deferred_softmaxes(flow: Flow, known: Collection[fx.Node], slots: list[Slot], lengths: Lengths) -> None:
    """Put slots at every exponential that weights tokens. ``known``: the products of weights and values that have some.

    Raises DecoderError if a mask does not prove causal.
    """
    masks = MaskClassifier(flow)
    found: list[tuple[fx.Node, Scores, WeightedSum]] = []
    for node in flow.program.calls():
        start = node.args[0] if opname(node) == "exp" else None
        if not isinstance(start, fx.Node) or len(lengths.axes(node)) != 2:
            continue
        axis = len(node_shape(node) or ()) - 1
        scores, applied = find_scores(start, axis, flow), find_values(node, axis, flow)
        if scores is None or not isinstance(applied, WeightedSum) or applied.source.node in known:
            continue
        found.append((node, scores, applied))
    for node, scores, applied in found:  # the graph is changed only now: the flow is that of before
        span = causal_span(applied.source.node, masks.classify(_mask_graph(node, scores, applied, lengths, flow)))
        product = scores.source
        keys = product.right if scores.keys in product.right_axes else product.left
        for role, operand, reader in (("key", keys, product.node), ("value", applied.values, applied.source.node)):
            start, path = _narrowest(operand)
            slot = Slot("keys", start, span=span, owner=origin(node).owner, role=role)
            keep(start, path, reader, slot, slots, lengths)


def _mask_graph(node: fx.Node, scores: Scores, applied: WeightedSum, lengths: Lengths, flow: Flow) -> MaskGraph:
    """What masks the scores: the addends before the exponential, and the weights that are zeroed behind it."""
    product = scores.source
    sizes: dict[str, Size] = {}
    for operand, letters in ((product.left, product.left_axes), (product.right, product.right_axes)):
        sizes |= dict(zip(letters, node_shape(operand) or (), strict=True))
    query = next(a for a in product.axes if a != scores.keys and lengths.has(sizes[a]))
    edited = any(opname(n) in _EDITS for n in applied.path)
    rank = len(product.axes)
    return MaskGraph(
        sizes[query],
        sizes[scores.keys],
        unshifted(scores.final, flow),
        node,
        product.node,
        product.axes.index(query) - rank,
        product.axes.index(scores.keys) - rank,
        post=applied.operand if edited else None,
        post_given=(node,),
    )


def _narrowest(operand: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The smallest tensor that an operand is only a view, a repetition or a cast of, and the nodes between them."""
    best, node, passed, path = operand, operand, list[fx.Node](), list[fx.Node]()
    while opname(node) in VIEWS | CASTS and opname(node) != "getitem" and isinstance(node.args[0], fx.Node):
        passed.insert(0, node)
        node = node.args[0]
        if _bytes(node) < _bytes(best):
            best, path = node, list(passed)
    return best, path


def _bytes(node: fx.Node) -> int:
    """The size of a tensor in bytes, with the symbols of its shape as large as they come."""
    held = node.meta["val"]
    known = numel(held.shape)
    return int(known.subs(dict.fromkeys(known.free_symbols, 1 << 20))) * held.dtype.itemsize
