"""Routing: which experts a call of a module of experts takes, with which weights, and the logits that both come from.

The indices are the whole numbers that enter the module, with one row per token; the weights are the numbers of their
shape. Both are computed from the logits of a router: the nearest projection before them that has a feature per expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from gatecc.ir.match.facts import Facts
from gatecc.ir.match.projection import Projection
from gatecc.ir.match.region import Region
from gatecc.ir.match.shapes import same_shape
from gatecc.ir.program import fake, shape
from gatecc.ir.site import Value, Weight
from gatecc.ir.sizes import on_example, same

_AXES = "be"  # tokens, and experts: all of them or those that were chosen


@dataclass(frozen=True)
class Routing:
    """``values``: router (T, E), weights and indices (T, k), those that were found. ``chosen``: k, 0 if not known."""

    values: dict[str, Value] = field(default_factory=dict[str, Value])
    weights: dict[str, Weight] = field(default_factory=dict[str, Weight])
    chosen: int = 0


def routing(facts: Facts, region: Region, given: fx.Node, experts: int) -> Routing:
    """Who chose the experts of a region that reads the tokens ``given`` (T, d), or (..., d)."""
    entering = region.enters(facts, whole_numbers=True)
    found = [node for node in entering if not _floats(node) and _per_token(node, given)]
    if len(found) != 1:
        return Routing()
    indices = found[0]
    candidates = [n for n in entering if n is not given and _floats(n) and same_shape(n, indices)]
    weights = candidates[0] if len(candidates) == 1 else None
    values = {"weights": weights, "indices": indices}
    router = _router(facts, [node for node in values.values() if node is not None], experts)
    named = {name: Value(node, _AXES) for name, node in values.items() if node is not None}
    chosen = on_example(shape(indices)[-1]) or 0
    if router is None:
        return Routing(named, {}, chosen)
    roles = {"router": router.weight} if router.weight is not None else {}
    return Routing({"router": Value(router.out, _AXES), **named}, roles, chosen)


def _floats(node: fx.Node) -> bool:
    held = fake(node)
    return held is not None and held.dtype.is_floating_point


def _per_token(node: fx.Node, given: fx.Node) -> bool:
    """Whether a value has a row for each token, and a few numbers in each: (T, k) for (T, d)."""
    held, tokens = shape(node), shape(given)[:-1]
    if len(held) == 2 and len(tokens) > 1:
        return True  # the tokens were flattened
    return len(held) == len(tokens) + 1 and all(
        same(a, b) or on_example(a) == on_example(b) for a, b in zip(held[:-1], tokens, strict=True)
    )


def _router(facts: Facts, ends: list[fx.Node], experts: int) -> Projection | None:
    """The projection with a feature per expert that the choice is computed from; None if there is none, or several."""
    found: dict[fx.Node, Projection] = {}
    seen, todo = set(ends), list(ends)
    while todo:
        node = todo.pop()
        projection = facts.projections.get(node)
        if projection is not None:
            if projection.out_width == experts:
                found[node] = projection
            continue
        new = [n for n in facts.inputs[node] if n in facts.data and n not in seen]
        seen.update(new)
        todo.extend(new)
    return next(iter(found.values())) if len(found) == 1 else None
