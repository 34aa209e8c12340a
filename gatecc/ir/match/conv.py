"""Conv sites: convolutions of one to three axes, transposed ones too, with a kernel that is a parameter."""

from __future__ import annotations

from collections.abc import Iterator

from gatecc.ir.match.facts import Facts
from gatecc.ir.match.registry import matcher
from gatecc.ir.site import Conv, Refusal


@matcher
def match_conv(facts: Facts) -> Iterator[Conv | Refusal]:
    """One site a convolution, in execution order; a kernel that is computed is refused (GCC130)."""
    for node, projection in facts.projections.items():
        if not projection.conv:
            continue
        values = {"in": facts.value(projection.inp), "out": facts.value(projection.out)}
        yield Conv(**facts.place("conv", node), values=values, weights=projection.weights)
    yield from (refusal for refusal in facts.refused if refusal.kind == "conv")
