"""Slots: what a decoder remembers at one token mixer, and the marks that stand for it in the graph.

Step rules put a mark where a value of the past enters; the labels read it, and the emitter writes it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from gatecc.decoder.analysis.axes import ALL, Span

Kind = Literal["keys", "taps", "scan", "state"]


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor of the state.

    ``keys``: values of all positions (or of a window) along ``axis``, appended in each step.
    ``taps``: the last ``count`` values along ``axis``. ``scan``: a running total (size 1 along ``axis``).
    ``state``: what the operator returns as its next state, in its ``output``. ``node`` has the shape, dtype and device
    (for taps, of what is remembered of: the axis is cut to ``count``); ``fill`` is the value before the first token.
    """

    kind: Kind
    node: fx.Node
    axis: int = 0
    span: Span = ALL
    count: int = 0
    fill: float = 0.0
    value: torch.Tensor | None = None  # the recorded value that has the shape, if it is not the node's own
    owner: str = ""
    output: int = 1

    @property
    def like(self) -> torch.Tensor:
        """A recorded (fake) tensor of the slot's shape and dtype."""
        return self.node.meta["val"] if self.value is None else self.value


def kept(x: Any, slot: int) -> Any:
    """Mark: ``x`` at all positions that the slot remembers and the new ones, which are appended to it."""
    raise NotImplementedError("a mark is written out before it runs")


def extended(x: Any, slot: int) -> Any:
    """Mark: ``x`` with the last values before it in front."""
    raise NotImplementedError("a mark is written out before it runs")


def carried(x: Any, slot: int) -> Any:
    """Mark: a running total ``x`` of the new positions with the total before them combined in."""
    raise NotImplementedError("a mark is written out before it runs")


def delayed(x: Any, slot: int) -> Any:
    """Mark: what ``x`` was as many positions before as the slot remembers."""
    raise NotImplementedError("a mark is written out before it runs")


def recalled(slot: int) -> Any:
    """Mark: the state that an operator starts from, zero before the first token."""
    raise NotImplementedError("a mark is written out before it runs")


def resumed(start: Any, slot: int) -> Any:
    """Mark: the state that an operator starts from, ``start`` before the first token."""
    raise NotImplementedError("a mark is written out before it runs")


STATES = (recalled, resumed)
MARKS = (kept, extended, carried, delayed, *STATES)
