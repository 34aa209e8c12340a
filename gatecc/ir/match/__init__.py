"""find_sites: every site of a canonical program, and every place that looks like one and is refused.

One matcher per kind, one file each. They share the facts that gatecc.ir.match.facts collects in one sweep, so all of
them together are linear in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gatecc.ir.match.activation import match_activation
from gatecc.ir.match.attention.hidden import match_hidden
from gatecc.ir.match.attention.walk import match_attention
from gatecc.ir.match.block import match_block
from gatecc.ir.match.conv import match_conv
from gatecc.ir.match.embedding import match_embedding
from gatecc.ir.match.experts import match_experts
from gatecc.ir.match.head import match_head
from gatecc.ir.match.joins import JoinedFacts
from gatecc.ir.match.linear import match_linear
from gatecc.ir.match.merge import match_merge
from gatecc.ir.match.mlp import match_mlp
from gatecc.ir.match.residual import match_residual
from gatecc.ir.match.rnn import match_rnn
from gatecc.ir.program import Program
from gatecc.ir.site import Refusal, Site

_MATCHERS = (
    match_mlp,
    match_experts,
    match_linear,
    match_conv,
    match_rnn,
    match_activation,
    match_residual,
    match_merge,
    match_embedding,
    match_head,
    match_block,
)


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
    cores, refused = match_attention(program, facts.flow, facts.maps)
    refused += match_hidden(program)
    found = [*cores, *refused, *(item for matcher in _MATCHERS for item in matcher(facts))]
    sites: list[Site] = [item for item in found if isinstance(item, Site)]
    sites.sort(key=lambda site: max(value.node for value in site.values.values()))
    return Sites(sites, [item for item in found if isinstance(item, Refusal)])
