"""unspoken: products over pairs of tokens that are read by a second product, and of which no lowering spoke.

Weights without a softmax, a softmax over heads, distances between tokens: who looks for a reason finds one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.attention.scores import computed_sides
from gatecc.ir.match.axes import axis_after
from gatecc.ir.match.product import Product, product
from gatecc.ir.ops import CASTS, CONTRACTIONS, DROPOUTS, RESHAPES, SAME_SHAPE, SOFTMAXES, TRANSPOSES, VIEWS, opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.program import Program, origin
from gatecc.ir.refusals import CAUSES
from gatecc.ir.sizes import described_shape, node_shape, on_example
from gatecc.passes.lower.lowering import LOWERINGS

CODE = "GCC108"
NAME = "none"  # in the place of a lowering's
_PAIRS = CONTRACTIONS | {"cdist", "_euclidean_dist"}
_MOVES = VIEWS | CASTS | DROPOUTS | RESHAPES | TRANSPOSES | SAME_SHAPE | frozenset("getitem unsqueeze expand".split())
_REDUCTIONS = frozenset("sum mean amax amin max min logsumexp norm linalg_vector_norm argmax topk".split())
_BUDGET = 256  # nodes that are looked at behind a product


@dataclass(frozen=True, eq=False)
class _Pair:
    """``last`` reads a function of ``first``: ``between``, in the order of the graph."""

    first: fx.Node
    last: fx.Node
    between: tuple[fx.Node, ...]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.first, *self.between, self.last)


def unspoken(program: Program, outcomes: Sequence[Outcome]) -> Iterator[Outcome]:
    """An outcome for each pair of products that stands in a graph after all lowerings and has none."""
    if sum(_may_pair(program, node) for node in program.calls()) < 2:
        return
    left = [outcome for outcome in outcomes if not outcome.became]
    for pair in _pairs(Flow(program)):
        if any(origin(node).inserted_by in LOWERINGS for node in pair.nodes) or _spoken(pair, left):
            continue
        place = origin(pair.last)
        yield Outcome(
            NAME, place.owner, place.line, _found(pair), reason=f"{CAUSES[CODE].title}: {_why(pair)} ({CODE})"
        )


def _may_pair(program: Program, node: fx.Node) -> bool:
    """Whether a node may be a product of two computed tensors."""
    return opname(node) in _PAIRS and not any(program.is_parameter(n) for n in node.all_input_nodes)


# --- pairs ------------------------------------------------------------------------------------------------------------


def _pairs(flow: Flow) -> Iterator[_Pair]:
    lasts: set[fx.Node] = set()  # what weighs values yields no scores
    for node in flow.order:
        ends = _ends(node, flow) if opname(node) in _PAIRS and node not in lasts else None
        found = None if ends is None else _follow(node, ends, flow)
        if found is not None:
            lasts.add(found.last)
            if _functions(found) or not _is_state(found):
                yield found


def _ends(node: fx.Node, flow: Flow) -> tuple[int, int] | None:
    """The axes of a product of two computed tensors that are one operand's alone: of the left, of the right."""
    if opname(node) not in CONTRACTIONS:  # distances
        rank, sides = len(node_shape(node) or ()), node.all_input_nodes
        computed = len(sides) > 1 and not any(side in flow.raw for side in sides[:2])
        return (rank - 2, rank - 1) if computed and rank > 1 else None
    found = product(node)
    if found is None or computed_sides(found, flow) < 2:
        return None
    shape = node_shape(node) or ()
    own = [[i for i, a in enumerate(found.axes) if a in one and a not in other] for one, other in _sides(found)]
    left, right = ([i for i in places if on_example(shape[i]) != 1] for places in own)
    return (left[-1], right[-1]) if left and right else None


def _sides(found: Product) -> tuple[tuple[str, str], tuple[str, str]]:
    return (found.left_axes, found.right_axes), (found.right_axes, found.left_axes)


def _follow(first: fx.Node, ends: tuple[int, int], flow: Flow) -> _Pair | None:
    """The first product that sums a function of another over one of its two axes, and keeps the other."""
    came: dict[fx.Node, fx.Node | None] = {first: None}
    queue: list[tuple[fx.Node, int | None, int | None]] = [(first, *ends)]
    while queue and len(came) < _BUDGET:
        node, one, other = queue.pop(0)
        for user in sorted(node.users, key=flow.order.__getitem__):
            if user in came or user.op != "call_function":
                continue
            name = opname(user)
            if name in CONTRACTIONS:
                if _sums(user, node, one, other, flow):
                    return _Pair(first, user, _way(node, first, came, flow))
                continue
            ends_after = [None if at is None else axis_after(user, node, at) for at in (one, other)]
            if name in _REDUCTIONS and None in ends_after:
                continue
            came[user] = node
            queue.append((user, ends_after[0], ends_after[1]))
    return None


def _is_state(pair: _Pair) -> bool:
    """Whether a product of products costs no more as it is written than the other way round: q (k^T v)."""
    first, last = product(pair.first), product(pair.last)
    side = None if last is None else next((s for n in pair.nodes if (s := last.side(n)) is not None), None)
    if first is None or side is None:
        return False
    sizes = _sizes(first.left_axes, first.left) | _sizes(first.right_axes, first.right)
    summed = prod(sizes[a] for a in first.contracted)
    ends = [sizes[a] for a in first.axes if (a in first.left_axes) != (a in first.right_axes)]
    axes, values, values_axes = side
    width = prod(size for a, size in _sizes(values_axes, values).items() if a not in axes)
    return prod(ends) * (summed + width) <= sum(ends) * summed * width


def _sizes(axes: str, node: fx.Node) -> dict[str, int]:
    """On the example."""
    return {a: on_example(size) or 1 for a, size in zip(axes, node_shape(node) or (), strict=True)}


def _sums(user: fx.Node, node: fx.Node, one: int | None, other: int | None, flow: Flow) -> bool:
    found = product(user)
    if found is None:  # of three tensors, say
        return opname(user) == "einsum" and sum(n not in flow.raw for n in user.all_input_nodes) > 1
    side = found.side(node)
    if side is None or side[1] in flow.raw:
        return False
    axes = side[0]
    letters = [None if at is None else axes[at] for at in (one, other)]
    summed = [None if letter is None else letter in found.contracted for letter in letters]
    return summed != [False, False] and summed != [True, True]


def _way(node: fx.Node | None, first: fx.Node, came: dict[fx.Node, fx.Node | None], flow: Flow) -> tuple[fx.Node, ...]:
    """The nodes between a product and one that was reached, and what else on that way is made of the product."""
    way: set[fx.Node] = set()
    while node is not None and node is not first:
        way.update(n for n in (node, *node.all_input_nodes) if n in came and n is not first)
        node = came[node]
    return tuple(sorted(way, key=flow.order.__getitem__))


# --- what is said -----------------------------------------------------------------------------------------------------


def _spoken(pair: _Pair, left: Sequence[Outcome]) -> bool:
    """Whether a lowering said why it left the pair alone: of its nodes, or of attention on one of its lines."""
    names = {node.name for node in pair.nodes}
    lines = {(origin(node).owner, origin(node).line) for node in pair.nodes}
    for outcome in left:
        by_line = not outcome.about and outcome.lowering in LOWERINGS and LOWERINGS[outcome.lowering].refuses
        if names & outcome.about or (by_line and (outcome.place, outcome.line) in lines):
            return True
    return False


def _functions(pair: _Pair) -> list[str]:
    return [opname(node) for node in pair.between if opname(node) not in _MOVES]


def _found(pair: _Pair) -> str:
    names = ", ".join(dict.fromkeys(_functions(pair))) or "nothing but moves"
    return f"a product of a product {described_shape(pair.first)}, with {names} between them"


def _why(pair: _Pair) -> str:
    names = _functions(pair)
    if any(name in SOFTMAXES for name in names):
        return "its softmax does not run over what the second product sums"
    if not set(names) - {"mul", "div"}:
        return "nothing between them has to see single pairs, so the second product costs less if it comes first"
    return "what is between them is no softmax, and it was not proved to be a recurrence"


__all__ = ["CODE", "NAME", "unspoken"]
