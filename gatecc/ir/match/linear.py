"""Linear sites: products with a weight matrix, whoever holds it (nn.Linear, Conv1D, a bare Parameter)."""

from __future__ import annotations

from collections.abc import Iterator

from gatecc.ir.match.facts import Facts
from gatecc.ir.match.registry import matcher
from gatecc.ir.site import Linear, Refusal


@matcher
def match_linear(facts: Facts) -> Iterator[Linear | Refusal]:
    """One site a product, in execution order; refused: computed, stacked and left-hand weights (GCC130-132)."""
    for node, projection in facts.projections.items():
        if projection.conv:
            continue
        values = {"in": facts.value(projection.inp), "out": facts.value(projection.out)}
        yield Linear(**facts.place("linear", node), values=values, weights=projection.weights)
    yield from (refusal for refusal in facts.refused if refusal.kind == "linear")
