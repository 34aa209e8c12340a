"""Step rule of attention: keys and values of earlier tokens enter through slots, before heads are repeated.

Attention whose weights are normalised later is in gatecc.decoder.rules.deferred_softmax, other token mixers in
gatecc.decoder.rules.scan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from gatecc.decoder.analysis.axes import ALL, Lengths, Span
from gatecc.decoder.refuse import refusal
from gatecc.decoder.rules.slots import Slot, kept
from gatecc.ir.mask import Mask
from gatecc.ir.match.product import product
from gatecc.ir.ops import CASTS, VIEWS, opname
from gatecc.ir.program import META, Program
from gatecc.ir.site import Attention
from gatecc.ir.sizes import described_shape, node_shape

_PASSED = VIEWS | CASTS | frozenset(("mul", "div"))


@dataclass(frozen=True, eq=False)
class Recalled:
    """An attention that reads slots. ``keys`` and ``values`` are the marks, ``repeats`` the nodes that repeat their
    heads for ``group`` query heads each.

    ``plain``: its mask hides from the newest token none of the keys that its slots hold. ``scale``: what its scores are
    multiplied by, and cut to by ``soft_cap``; None if it does anything else but hide padding, or what it does is not
    known. ``hiding``: the inputs whose values its mask is made of.
    """

    keys: fx.Node
    values: fx.Node
    repeats: frozenset[fx.Node]
    group: int
    plain: bool
    query: fx.Node
    scale: float | None
    soft_cap: float
    fused: bool
    hiding: frozenset[fx.Node]


def attention(program: Program, site: Attention, slots: list[Slot], lengths: Lengths) -> Recalled | None:
    """Let one attention read its keys and values from slots. Raises DecoderError if its mask does not prove causal.

    Attention whose keys do not grow with the tokens (cross-attention, for example) stays as it is.
    """
    k, v = site.values["k"], site.values["v"]
    if not any(lengths.has(size) for size in k.node.meta["val"].shape):
        return None
    span = causal_span(site.core, site.mask)
    marks: list[fx.Node] = []
    repeats: list[fx.Node] = []
    for role, start, reader in (("key", k.node, _product(program, site, k.node)), ("value", v.node, site.core)):
        path = _path(start, reader)
        if path is None:
            raise refusal(reader, f"{start.name} reaches it through operators that are not understood")
        slot = Slot("keys", start, span=span, owner=site.owner, role=role)
        mark, copies = keep(start, path, reader, slot, slots, lengths)
        marks.append(mark)
        repeats += copies
    mask, query = site.mask, site.values["q"]
    placed = mask.kind in ("causal", "sliding_window") and not mask.bias
    fused = site.spelling == "sdpa"
    group = _group(site, site.core.args[0] if fused else query.node, marks)
    known = site.scale is not None and site.scale > 0 and not (site.sinks or site.dropout or mask.asserted)
    known = known and str(query.axes) in ("bhnd", "bhmd") and site.over == "tokens" and not site.cross
    known = known and len(node_shape(site.core) or ()) == 4
    scale = site.scale if known and placed and group else None
    plain, cap = placed and not mask.padding, site.soft_cap or 0.0
    return Recalled(marks[0], marks[1], frozenset(repeats), group, plain, query.node, scale, cap, fused, _hiding(site))


def _hiding(site: Attention) -> frozenset[fx.Node]:
    """The inputs whose values, and not their sizes alone, the masks of an attention are made of."""
    stack = [value.node for name, value in site.values.items() if name.rstrip("0123456789") == "mask"]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen and not opname(node).startswith("sym_"):
            seen.add(node)
            stack += node.all_input_nodes
    return frozenset(node for node in seen if node.op == "placeholder")


def _group(site: Attention, query: Any, marks: list[fx.Node]) -> int:
    """The number of query heads per key head, 0 if the axes are not (batch, heads, positions, features)."""
    shapes = [list(node_shape(n) or ()) for n in (query, *marks) if isinstance(n, fx.Node)]
    if any(len(shape) != 4 or not isinstance(shape[1], int) for shape in shapes) or len(shapes) != 3:
        return 0
    q, k, v = (int(shape[1]) for shape in shapes)
    axes = all(site.values[name].axes == "bhmd" for name in "kv")
    return q // k if axes and k == v and q % k == 0 else 0


def _product(program: Program, site: Attention, keys: fx.Node) -> fx.Node:
    """The node in which queries meet keys."""
    if site.spelling == "sdpa":
        return site.core
    stack, seen = [keys], {keys}
    while stack:
        node = stack.pop()
        for user in node.users:
            computed = [n for n in user.all_input_nodes if program.path(n) is None]
            if product(user) is not None and any(n is not node for n in computed):
                return user
            if opname(user) in _PASSED and user not in seen:
                seen.add(user)
                stack.append(user)
    raise refusal(site.core, "the product of queries and keys was not found")


def causal_span(core: fx.Node, mask: Mask) -> Span:
    """The keys that a query may see. Raises DecoderError if the mask does not prove causal."""
    if not mask.causal:
        raise refusal(
            core,
            f"the mask of this attention does not prove causal: {mask.reason or mask.kind}",
            do="a decoder needs a model in which no token sees a later one",
        )
    return Span(window=mask.window) if mask.kind == "sliding_window" else ALL


def keep(
    start: fx.Node, path: list[fx.Node], reader: fx.Node, slot: Slot, slots: list[Slot], lengths: Lengths
) -> tuple[fx.Node, list[fx.Node]]:
    """Put a mark behind ``start`` on the path to ``reader``; other readers go on with the new positions.

    Returns the mark and the nodes between it and the reader, which are copies.
    """
    axes = lengths.axes(start)
    if len(axes) != 1 or not lengths.pure(start.meta["val"].shape[axes[0]]):
        raise refusal(start, f"keys or values of shape ({described_shape(start)})")
    slots.append(replace(slot, axis=axes[0]))
    graph = start.graph
    with graph.inserting_before(path[0] if path else reader):
        mark = graph.call_function(kept, (start, len(slots) - 1))
    mark.meta = {"val": start.meta["val"], META: start.meta.get(META)}
    before, now, copies = start, mark, list[fx.Node]()
    for node in path:
        with graph.inserting_before(node):
            copies.append(graph.node_copy(node, lambda n, old=before, new=now: new if n is old else n))
        before, now = node, copies[-1]
    _replace_operand(reader, before, now, slot.role)
    return mark, copies


def _path(start: fx.Node, reader: fx.Node) -> list[fx.Node] | None:
    """The nodes between ``start`` and ``reader``, in order; None if no chain of views and factors joins them."""
    stack: list[tuple[fx.Node, list[fx.Node]]] = [(start, [])]
    while stack:
        node, passed = stack.pop()
        for user in node.users:
            if user is reader:
                return passed
            if opname(user) in _PASSED:
                stack.append((user, [*passed, user]))
    return None


def _replace_operand(reader: fx.Node, old: fx.Node, new: fx.Node, role: str) -> None:
    """Read ``new`` for the keys or the values, which may be one node, and be the query of a fused attention as well."""
    if opname(reader) != "scaled_dot_product_attention":
        reader.replace_input_with(old, new)
        return
    at = ("key", "value").index(role) + 1
    reader.args = tuple(new if i == at and a is old else a for i, a in enumerate(reader.args))
