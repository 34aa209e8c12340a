"""Activation sites: the nonlinearities of the stream, one operator or written out."""

from __future__ import annotations

from collections.abc import Iterator

from gatecc.ir.match.facts import Facts
from gatecc.ir.match.registry import matcher
from gatecc.ir.site import Activation


@matcher
def match_activation(facts: Facts) -> Iterator[Activation]:
    """One site a nonlinearity of the stream, in execution order; those of constants are none."""
    for found in facts.nonlinearities.values():
        if found.out not in facts.data:
            continue
        values = {"in": facts.value(found.inp), "out": facts.value(found.out)}
        yield Activation(**facts.place("activation", found.out), values=values, function=found.function)
