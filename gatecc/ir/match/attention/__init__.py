"""Attention sites: found by one walk over the graph, and put together from what lies around the softmax."""

from __future__ import annotations

from collections.abc import Iterator

from gatecc.ir.match.attention.hidden import match_hidden
from gatecc.ir.match.attention.walk import match_attention as match_attention
from gatecc.ir.match.joins import JoinedFacts
from gatecc.ir.match.registry import matcher
from gatecc.ir.site import Attention, Refusal


@matcher
def match(facts: JoinedFacts) -> Iterator[Attention | Refusal]:
    """Every attention of a program, and what looks like one."""
    cores, refused = match_attention(facts.program, facts.flow, facts.maps)
    yield from cores
    yield from refused
    yield from match_hidden(facts.program)
