"""Matchers by registration: a new kind of site brings its own, and no list is edited."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from gatecc.ir.match.joins import JoinedFacts
from gatecc.ir.site import Refusal, Site

Matcher = Callable[[JoinedFacts], Iterable[Site | Refusal]]
MATCHERS: list[Matcher] = []
M = TypeVar("M", bound=Matcher)


def matcher(function: M) -> M:
    """Register a function that finds the sites of a kind in a program's facts, and refuses what only looks so."""
    MATCHERS.append(function)
    return function
