"""Anneal: a number that changes over the training steps, such as a temperature.

It lives in a buffer, so that a captured or compiled graph follows it; `gatecc.train.routing` moves it once per step of
the optimizer. Text: ``linear(2.0, 0.3, 1000)``, ``exponential(2.0, 0.3, 1000)``, ``cosine(2.0, 0.3, 1000)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gatecc.ir.gates.option import Option


@dataclass(frozen=True)
class Anneal(Option, slot="anneal"):
    """From ``start`` to ``end`` in ``steps`` steps of the optimizer; it stays there."""

    start: float
    end: float
    steps: int

    def check(self) -> None:
        self.require(self.steps > 0, "steps", "a positive integer")

    def at(self, step: int) -> float:
        """The number at a step, the first being 0."""
        return self.between(min(1.0, max(0, step) / self.steps))

    def between(self, part: float) -> float:
        """The number after this part of the way, between 0 and 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Anneal, tag="linear"):
    """A straight line."""

    def between(self, part: float) -> float:
        return self.start + (self.end - self.start) * part


@dataclass(frozen=True)
class Exponential(Anneal, tag="exponential"):
    """The same factor at each step; both ends are positive."""

    def check(self) -> None:
        super().check()
        self.require(self.start > 0, "start", "a positive number")
        self.require(self.end > 0, "end", "a positive number")

    def between(self, part: float) -> float:
        return self.start * (self.end / self.start) ** part


@dataclass(frozen=True)
class Cosine(Anneal, tag="cosine"):
    """Half a period of a cosine: slow at both ends."""

    def between(self, part: float) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * part)) / 2


def first(value: float | Anneal) -> float:
    """The number before training."""
    return value.at(0) if isinstance(value, Anneal) else value


def least(value: float | Anneal) -> float:
    """The smallest number that it becomes: all ways are monotonic."""
    return min(value.start, value.end) if isinstance(value, Anneal) else value
