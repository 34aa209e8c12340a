"""From a softmax back to the product of queries and keys, and what is done to the scores on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.axes import axis_before, tensor_source
from gatecc.ir.match.product import Product, product
from gatecc.ir.ops import CASTS, CONTRACTIONS, DROPOUTS, TRANSPOSES, VIEWS, argument, opname
from gatecc.ir.pattern import Pattern, Patterns, anything, call, through
from gatecc.ir.scalars import scalar
from gatecc.ir.sizes import node_shape, same

_JOINS = frozenset("add sub rsub mul div maximum minimum max where cat pad constant_pad_nd copy slice_scatter".split())
_STEPS = (
    _JOINS
    | VIEWS
    | CASTS
    | DROPOUTS
    | frozenset("neg tanh clamp clamp_min clamp_max clip masked_fill nan_to_num tril triu index_put".split())
)
_MOVING = frozenset("gather index index_select slice select roll flip cat pad constant_pad_nd".split())
_BUDGET = 256  # nodes looked at per softmax: a bias may be long, a model must not be walked through


@dataclass(frozen=True, eq=False)
class Scores:
    """``source`` is the product of queries and keys, ``path`` the nodes after it up to and including ``final``, the
    last node whose last axes are still (queries, keys): the softmax input, or what a sink logit is appended to.
    """

    source: Product
    keys: str  # the letter of the key axis in source.axes
    final: fx.Node
    path: list[fx.Node]
    sinks: bool = False
    others: list[fx.Node] = field(default_factory=list[fx.Node])  # further products that are added (relative positions)


@dataclass(frozen=True, eq=False)
class _Visit:
    node: fx.Node
    axis: int | None
    lost: tuple[Any, int] | None  # the shape at which the axis was last known, while a reshape hides it
    path: tuple[fx.Node, ...]  # from the softmax input to the node before this one


def find_scores(start: fx.Node, axis: int, flow: Flow) -> Scores | None:
    """The product that a softmax over ``axis`` of ``start`` normalises; None if there is none of computed tensors."""
    found = [(visit, p) for visit, p in _products(start, axis)]
    best = max(found, key=lambda pair: _rank(pair[0], pair[1], flow), default=None)
    if best is None:
        return None
    visit, source = best
    assert visit.axis is not None
    letter = source.axes[visit.axis]
    if computed_sides(source, flow) < 2 or (letter in source.left_axes) == (letter in source.right_axes):
        return None
    path = [*reversed(visit.path)]
    others = [p.node for _, p in found if p.node is not source.node]
    cat = next((i for i, n in enumerate(path) if opname(n) == "cat" and _widens(n, axis)), None)
    if cat is None:
        return Scores(source, letter, start, path, False, others)
    return Scores(source, letter, path[cat - 1] if cat else source.node, path[:cat], True, others)


def computed_sides(source: Product, flow: Flow) -> int:
    """How many operands are more than a parameter or a constant."""
    return sum(x not in flow.raw for x in (source.left, source.right))


def _widens(node: fx.Node, axis: int) -> bool:
    rank = len(node_shape(node) or ())
    return int(argument(node, 1, "dim", 0)) % rank == axis % rank


def _rank(visit: _Visit, source: Product, flow: Flow) -> tuple[int, int, int, int]:
    """Prefer products of two computed tensors that depend on the inputs, then those that are moved least on the way."""
    sides = (source.left, source.right)
    data = sum(x in flow.data for x in sides)
    moves = sum(opname(n) in _MOVING for n in visit.path)
    return computed_sides(source, flow), data, -moves, flow.order[source.node]


def _products(start: fx.Node, axis: int) -> Iterator[tuple[_Visit, Product]]:
    rank = len(node_shape(start) or ())
    stack = [_Visit(start, axis % rank if rank else 0, None, ())]
    seen: set[fx.Node] = set()
    while stack and len(seen) < _BUDGET:
        visit = stack.pop()
        if visit.node in seen:
            continue
        seen.add(visit.node)
        if opname(visit.node) in CONTRACTIONS:
            found = product(visit.node)
            if found is not None and visit.axis is not None and found.axes[visit.axis] not in found.contracted:
                yield visit, found
            if found is None or found.addend is None:
                continue
        elif opname(visit.node) not in _STEPS:
            continue
        stack.extend(_before(visit))


def _before(visit: _Visit) -> Iterator[_Visit]:
    node = visit.node
    for source in _sources(node):
        axis, lost = None if visit.axis is None else axis_before(node, source, visit.axis), visit.lost
        if axis is None and visit.axis is not None and opname(node) not in TRANSPOSES:
            lost = (node_shape(node), visit.axis)
        if axis is None and lost is not None and _equal(node_shape(source), lost[0]):
            axis, lost = lost[1], None
        yield _Visit(source, axis, lost, (*visit.path, node))


def _equal(one: Any, other: Any) -> bool:
    return one is not None and other is not None and len(one) == len(other) and all(map(same, one, other))


def _sources(node: fx.Node) -> list[fx.Node]:
    name = opname(node)
    if name in CONTRACTIONS:
        found = product(node)
        return [found.addend] if found is not None and found.addend is not None else []
    if name in _JOINS:
        return node.all_input_nodes
    source = tensor_source(node)
    return [] if source is None else [source]


# --- what is done to the scores ---------------------------------------------------------------------------------------


def scalar_factor(node: fx.Node, source: fx.Node, flow: Flow) -> float | None:
    """What ``node`` multiplies ``source`` by: 1 for operators that do not scale, None if it is no constant."""
    name = opname(node)
    if name == "neg":
        return -1.0
    if name in ("add", "sub", "rsub") and unshifted(node, flow) is node:
        second = len(node.args) > 1 and source is node.args[1]
        alpha = scalar(node.kwargs.get("alpha", 1), flow)
        scaled = alpha if second != (name == "rsub") else 1.0
        negated = {"add": False, "sub": second, "rsub": not second}[name]
        return None if scaled is None else -scaled if negated else scaled
    if name not in ("mul", "div"):
        return 1.0
    one, other = node.args[0], node.args[1]
    if name == "div" and source is other:
        return None
    factor = scalar(other if source is one else one, flow)
    if factor is None:
        return None
    return factor if name == "mul" else 1.0 / factor


def scale_of(scores: Scores, flow: Flow) -> float | None:
    """The constant that the product is multiplied by before the softmax. None if it is not a constant, or if the scores
    go through more than that, a soft cap, and masks behind it: numbers that clamp them, say."""
    total, source, capped, masked = scores.source.alpha, scores.source.node, False, False
    for node in scores.path:
        factor, name = scalar_factor(node, source, flow), opname(node)
        if factor is None or (name in _BOUNDS and not _guards(node, source, flow)):
            return None
        if name == "tanh" and (capped or masked):
            return None
        capped, masked = capped or name == "tanh", masked or name in _MASKING
        total, source = total * factor, node
    return total


_BOUNDS = frozenset("clamp clamp_min clamp_max clip maximum minimum max".split())
_MASKING = frozenset("add sub rsub where masked_fill tril triu index_put".split())
_LEAST = -65504.0  # of float16: no score is below it


def _guards(node: fx.Node, source: fx.Node, flow: Flow) -> bool:
    """Whether a bound only keeps scores above the least number of a dtype."""
    name = opname(node)
    bounds = [n for n in (*node.args, *node.kwargs.values()) if n is not source and n is not None]
    low = scalar(bounds[0], flow) if len(bounds) == 1 else None
    above = name in ("maximum", "max", "clamp_min") or (
        name in ("clamp", "clip") and argument(node, 1, "min") is not None
    )
    return above and low is not None and low <= _LEAST


def soft_cap(scores: Scores, flow: Flow) -> float | None:
    """``c`` if the scores go through ``c * tanh(scores / c)``."""
    cap: float | None = None
    source = scores.source.node
    for node in scores.path:
        factor = scalar_factor(node, source, flow)
        if cap is not None and factor is None:
            return None
        cap = 1.0 if opname(node) == "tanh" else None if cap is None or factor is None else cap * factor
        source = node
    return cap


_MAXIMUM = through(VIEWS | CASTS, call("amax max", anything("scores"), ...))
_SHIFTED = Patterns(Pattern("scores less their largest", call("sub", anything("scores"), _MAXIMUM)))


def unshifted(node: fx.Node, flow: Flow) -> fx.Node:
    """The scores before their row's maximum is subtracted, which a softmax does not see but a proof does."""
    shifted = _SHIFTED.at(node, flow)
    return node if shifted is None else shifted["scores"]
