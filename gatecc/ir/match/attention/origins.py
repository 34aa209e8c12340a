"""Origins: what queries, keys or values come from, through views, norms and rotary embeddings.

Usually one projection of one stream. With adapters it is a sum of products (see maps.py). Where attention joins two
streams along the tokens (SD3, Flux), each part has a projection of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.axes import axis_after
from gatecc.ir.match.maps import LinearMaps, Map, module_apart, shared_module
from gatecc.ir.match.projection import Projection, weighted
from gatecc.ir.ops import CASTS, CONTRACTIONS, DROPOUTS, VIEWS, argument, opname
from gatecc.ir.program import Program, origin
from gatecc.ir.sizes import node_shape, same

_ELEMENTWISE = frozenset(
    "add sub mul div neg cat stack pow rsqrt sqrt mean sum norm linalg_vector_norm clamp_min clamp layer_norm rms_norm "
    "batch_norm group_norm sigmoid relu gelu silu view_as_complex view_as_real complex expand_as pad "
    "constant_pad_nd".split()
)
_BETWEEN = VIEWS | CASTS | DROPOUTS | _ELEMENTWISE
_BENDING = frozenset("sigmoid relu gelu silu".split())  # what a linear map in two steps has not between them
_BUDGET = 160


@dataclass(frozen=True, eq=False)
class Origins:
    """``projection`` made the value, through the nodes ``between`` (in graph order, the value included).

    Where tokens of several streams are joined, ``projection`` made the first of them, ``others`` the rest in order, and
    ``part`` is the first one's value before the join.
    """

    projection: Projection
    between: list[fx.Node]
    turn: fx.Node | None  # the first node of a rotary embedding
    others: tuple[Projection, ...] = ()
    part: fx.Node | None = None

    @property
    def projections(self) -> tuple[Projection, ...]:
        """One for each part of the tokens."""
        return (self.projection, *self.others)

    @property
    def rotary(self) -> bool:
        """Whether the value is turned by its position."""
        return self.turn is not None

    def before_rotary(self) -> fx.Node | None:
        """The last value that all of the flow to the rotary embedding goes through."""
        nodes = [self.projection.node, *self.between]
        place = {node: i for i, node in enumerate(nodes)}
        reach, last = 0, None  # how far the readers of earlier values lie
        for i, node in enumerate(nodes):
            if node is self.turn:
                return last
            if reach <= i:
                last = node
            reach = max([reach, *(place[u] for u in node.users if u in place)])
        return None


class Tracer:
    """Finds origins in one program. ``within`` is the owner of the attention, ``tokens`` a value's axis of tokens."""

    def __init__(self, flow: Flow, maps: LinearMaps) -> None:
        self.flow = flow
        self.maps = maps

    def find(self, node: fx.Node, within: str, tokens: int | None = None) -> Origins | None:
        """The one projection that ``node`` comes from, or one for each part of its tokens; None if it is neither."""
        found, seen = self._gather(node, within)
        if len(seen) >= _BUDGET or not found:
            return None
        if len(found) == 1:
            between = self._between(found[0].node, seen)
            return Origins(found[0], between, _rotary(found[0].node, between, self.flow.program))
        return self._joined(node, seen, within, tokens) if tokens is not None else None

    def starts(self, made: Projection, within: str) -> list[fx.Node]:
        """What a projection reads, and what it starts from if it is the second of two that make fewer features and then
        more, token by token and with no more than a norm between.
        """
        found, seen = self._gather(made.x, within)
        alone = len(found) == 1 and len(seen) < _BUDGET and seen.isdisjoint(self.flow.program.placeholders)
        if not alone or not found[0].pointwise or any(opname(n) in _BENDING for n in seen):
            return [made.x]
        first = found[0]
        narrow = 0 < first.out_width < first.in_width or first.in_width == 0
        return [made.x, first.x] if narrow and first.node is not made.node else [made.x]

    def _gather(self, node: fx.Node, within: str) -> tuple[list[Projection], set[fx.Node]]:
        found: list[Projection] = []
        seen: set[fx.Node] = set()
        stack = [node]
        while stack and len(seen) < _BUDGET:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            whole = self.maps.maps.get(current)
            if whole is not None:
                found += [self._sum(whole, within)]
            elif opname(current) in CONTRACTIONS:
                made = weighted(current, self.flow) if current in self.flow.data else None
                found += [self._entered(made, within)] if made is not None else []
            elif opname(current) in _BETWEEN:
                stack.extend(current.all_input_nodes)
        return found, seen

    def _sum(self, whole: Map, within: str) -> Projection:
        """A sum of products as one projection without a weight."""
        main = weighted(whole.main, self.flow)
        conv = main is not None and main.conv
        width = (node_shape(whole.end) or (0, 0))[1 if conv else -1]
        root = self._root(whole.root, whole.main, within)
        features = width if isinstance(width, int) else 0
        return Projection(whole.end, root, root, whole.end, None, 0, features, conv=conv)

    def _entered(self, made: Projection, within: str) -> Projection:
        """A projection that reads what enters its module: OFT and IA3 change the stream there."""
        root = self._root(made.x, made.node, within)
        return made if root is made.x else replace(made, x=root)

    def _root(self, node: fx.Node, product: fx.Node, within: str) -> fx.Node:
        runner = origin(product).owner
        entry = self.maps.entered(node, module_apart(runner, within))
        return self.maps.kept(entry, shared_module(runner, within))

    def _joined(self, node: fx.Node, seen: set[fx.Node], within: str, tokens: int) -> Origins | None:
        """Streams that are concatenated along the tokens, each with one projection."""
        cats = sorted((n for n in seen if opname(n) == "cat"), key=self.flow.order.__getitem__, reverse=True)
        for cat in cats:
            between = self._between(cat, seen)
            if self._arrives(cat, [cat, *between], node) != tokens:
                continue
            pieces = [piece for piece in argument(cat, 0, "tensors") if isinstance(piece, fx.Node)]
            parts = [self.find(piece, within) for piece in pieces]
            if None in parts or not pieces:
                return None
            known = [part for part in parts if part is not None]
            first = known[0]
            rotary = _rotary(cat, between, self.flow.program) or first.turn
            others = tuple(part.projection for part in known[1:])
            return Origins(first.projection, [*first.between, cat, *between], rotary, others, pieces[0])
        return None

    def _arrives(self, cat: fx.Node, path: list[fx.Node], end: fx.Node) -> int | None:
        """The axis of ``end`` that runs along the axis of a concatenation."""
        rank = len(node_shape(cat) or ())
        at: dict[fx.Node, int | None] = {cat: int(argument(cat, 1, "dim", 0)) % max(rank, 1)}
        for node in path[1:]:
            sources = [n for n in node.all_input_nodes if at.get(n) is not None]
            at[node] = axis_after(node, sources[0], at[sources[0]] or 0) if sources else None
        return at.get(end)

    def _between(self, start: fx.Node, seen: set[fx.Node]) -> list[fx.Node]:
        """The nodes of ``seen`` that ``start`` flows through."""
        order = self.flow.order
        reached = {start}
        result: list[fx.Node] = []
        for node in sorted((n for n in seen if order[n] > order[start]), key=order.__getitem__):
            if any(n in reached for n in node.all_input_nodes):
                reached.add(node)
                result.append(node)
        return result


def _rotary(start: fx.Node, between: list[fx.Node], program: Program) -> fx.Node | None:
    """The first node that turns the value: as complex numbers, or by a table that varies with position and feature."""
    own = {start, *between}
    for current in between:
        if opname(current) == "view_as_complex":
            return current
        if opname(current) != "mul":
            continue
        others = [n for n in current.all_input_nodes if n not in own]
        shape = node_shape(others[0]) if others else None
        wide = shape is not None and sum(not same(s, 1) for s in shape) >= 2
        if wide and program.path(others[0]) is None:
            return current
    return None
