"""Outcome: what a lowering says of one place of a graph, for the report and for ``explain``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a lowering says of one place.

    ``place``: FQN of the module; ``line``: of its source; ``found``: what stands there ("softmax attention, causal");
    ``became``: the operator that stands there now, empty if it was left alone; ``reason``: why it was left alone, or
    what proved it; ``gain``: what it saves, in words and numbers, an estimate; ``assumes``: names of the buffers that
    the proof read the values of, which the compiled graph must check on every call; ``about``: names of the graph's
    nodes that it speaks of, where the line does not tell.
    """

    lowering: str
    place: str
    line: str
    found: str
    became: str = ""
    reason: str = ""
    gain: str = ""
    assumes: tuple[str, ...] = ()
    about: frozenset[str] = frozenset()
