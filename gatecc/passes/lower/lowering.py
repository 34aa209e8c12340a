"""Lowering: one kind of thing that a graph spells out, and the operator that it becomes.

A lowering keeps the function. It looks at every place that might be meant, proves that the operator computes the same
there (from the graph, or by running both in float64), judges that it gains, and only then edits. It says what it did
and what it left alone: `Outcome`. Backend and export use the same lowerings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from gatecc.ir.outcome import Outcome
from gatecc.ir.program import Program
from gatecc.ir.site import Site

LOWERINGS: dict[str, type[Lowering]] = {}  # by name, in the order in which they run


@dataclass(frozen=True)
class Settings:
    """What a compilation is for. ``training``: autograd will differentiate the graph; ``freeze``: weights do not change
    between calls, or it is noticed; ``only``: names of the lowerings that may run, None for all."""

    training: bool = False
    freeze: bool = False
    only: tuple[str, ...] | None = None


class Lowering(ABC):
    """Register a subclass by giving it a ``name``. ``after``: names of lowerings that must have run before it;
    ``left``: what it leaves alone, for docs/compile.md; ``refuses``: a kind of site that no other lowering speaks for:
    what only looks like one is told of as left alone by this lowering, with the reason of the matcher."""

    name: ClassVar[str]
    left: ClassVar[str] = ""
    after: ClassVar[tuple[str, ...]] = ()
    refuses: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            LOWERINGS[cls.name] = cls

    @abstractmethod
    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        """Edit a canonical program in place; one outcome for each place that was looked at.

        ``sites`` are those of the program as it is now. What cannot be lowered is an Outcome with a reason, no
        error: an exception stops this lowering for the whole graph, which is then compiled without it.
        """


__all__ = ["LOWERINGS", "Lowering", "Outcome", "Settings"]
