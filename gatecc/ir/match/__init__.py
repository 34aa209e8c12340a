"""find_sites: every site of a canonical program, and every place that looks like one and is refused.

One matcher per kind, one file each. They share the facts that gatecc.ir.match.facts collects in one sweep, so all of
them together are linear in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gatecc.ir.discover import discover
from gatecc.ir.match.joins import JoinedFacts
from gatecc.ir.match.registry import MATCHERS
from gatecc.ir.program import Program
from gatecc.ir.site import KINDS, Refusal, Site


@dataclass(frozen=True)
class Sites:
    """``sites`` in execution order (of the nodes that yield their last values); ``refusals`` by kind."""

    sites: list[Site] = field(default_factory=list[Site])
    refusals: list[Refusal] = field(default_factory=list[Refusal])

    def of(self, kind: str) -> list[Site]:
        """The sites of one kind."""
        return [site for site in self.sites if site.kind == kind]


def find_sites(program: Program) -> Sites:
    """All sites of a program that gatecc.passes.canonicalize has brought into form."""
    facts = JoinedFacts(program)
    found = [item for matcher in MATCHERS for item in matcher(facts)]
    order = {kind: i for i, kind in enumerate(KINDS)}
    sites: list[Site] = [item for item in found if isinstance(item, Site)]
    sites.sort(key=lambda site: order[site.kind])
    sites.sort(key=lambda site: max(value.node for value in site.values.values()))
    refusals = [item for item in found if isinstance(item, Refusal)]
    return Sites(sites, sorted(refusals, key=lambda refusal: order.get(refusal.kind, len(order))))


discover(__name__, __path__, deep=False)
