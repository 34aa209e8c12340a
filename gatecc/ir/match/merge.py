"""Merge sites: adds and concatenations of two or more values that different weights computed, and that are no residual.

The skips of a U-Net by concatenation, parallel branches, sums of embeddings, two towers. The halves of a rotary
embedding, patches of one map and the parts of a written-out function come from one weight, so they are no merge.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import fx

from gatecc.ir.match.joins import JoinedFacts
from gatecc.ir.match.registry import matcher
from gatecc.ir.ops import CASTS, DROPOUTS, SOFTMAXES, VIEWS, opname
from gatecc.ir.program import fake
from gatecc.ir.refusals import refuse
from gatecc.ir.site import Merge, Refusal

_WEIGHERS = SOFTMAXES | {"exp"}
_TO_SOFTMAX = VIEWS | CASTS | DROPOUTS | frozenset("add sub mul div where masked_fill clamp tanh maximum".split())


@matcher
def match_merge(facts: JoinedFacts) -> Iterator[Merge | Refusal]:
    """One site a join, in execution order; refused: constants (GCC150), scores (GCC151), weightless values (GCC152)."""
    scores = _scores(facts)
    for node in facts.program.calls():
        form = opname(node)
        if facts.maps.around(node) is not None and not facts.is_sum_of_equals(node):
            continue  # an adapter is added to the projection that it stands beside
        if (form == "add" or form == "cat") and node in facts.source and node not in facts.residuals:
            found = _merge(facts, node, form, scores)
            if found is not None:
                yield found


def _merge(
    facts: JoinedFacts, node: fx.Node, form: Literal["add", "cat"], scores: set[fx.Node]
) -> Merge | Refusal | None:
    parts = [part for part in _parts(node, form) if part in facts.source or not _broadcasts(part)]
    held = fake(node)
    if len(parts) < 2 or held is None or not held.dtype.is_floating_point:
        return None
    plain = [part for part in parts if part not in facts.source and not _is_input(facts, part)]
    if node in scores:
        sums = all(part in facts.source for part in parts) and _distinct(facts, parts)
        return refuse("GCC151", "merge", node) if sums else None  # else a bias or a mask is added
    if plain:
        code = "GCC152" if any(part in facts.data for part in plain) else "GCC150"
        return refuse(code, "merge", node, ", ".join(part.name for part in plain))
    if not _distinct(facts, parts):
        return None
    values = {f"in{i}": facts.value(part) for i, part in enumerate(parts)} | {"out": facts.value(node)}
    return Merge(**facts.place("merge", node), values=values, form=form)


def _parts(node: fx.Node, form: str) -> list[fx.Node]:
    """The tensors that are joined."""
    given = node.args[0] if form == "cat" else node.args[:2]
    parts = [part for part in given if isinstance(part, fx.Node)] if isinstance(given, (list, tuple)) else []
    return [part for part in parts if fake(part) is not None]


def _broadcasts(part: fx.Node) -> bool:
    """Whether a constant is a scalar or one number a feature, as a bias or an epsilon: no value of its own."""
    held = fake(part)
    return held is not None and sum(1 for size in held.shape if size != 1) <= 1


def _is_input(facts: JoinedFacts, part: fx.Node) -> bool:
    """Whether a part is an input of the program, through views only."""
    while opname(part) in VIEWS | CASTS and isinstance(part.args[0], fx.Node):
        part = part.args[0]
    held = fake(part)
    return facts.program.is_input(part) and held is not None and held.dtype.is_floating_point


def _distinct(facts: JoinedFacts, parts: list[fx.Node]) -> bool:
    """Whether the parts come from different weights (an input counts as one)."""
    return len({facts.source.get(part, part) for part in parts}) > 1


def _scores(facts: JoinedFacts) -> set[fx.Node]:
    """The nodes that only feed softmaxes over at least three axes, by element-wise steps: attention scores."""
    scores: set[fx.Node] = set()
    for node in reversed(facts.program.graph.nodes):
        if opname(node) not in _TO_SOFTMAX:
            continue
        users = [user for user in node.users if fake(user) is not None]
        if users and all(user in scores or _weighs(user, node) for user in users):
            scores.add(node)
    return scores


def _weighs(node: fx.Node, scores: fx.Node) -> bool:
    if opname(node) == "scaled_dot_product_attention":
        return scores not in node.args[:3]  # the mask, which may be a bias
    held = fake(node)
    return held is not None and held.dim() >= 3 and opname(node) in _WEIGHERS
