"""Slots: what a decoder remembers at one token mixer, and the marks that stand for it in the graph.

Step rules put a mark where a value of the past enters; the labels read it, and emit.slots writes it out.
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
    ``taps``: the last ``count`` values along ``axis``. ``scan``: a cumulative value (size 1 along ``axis``).
    ``state``: what the operator returns as its next state, as its result number ``output``. ``node`` has the shape,
    dtype and device (for taps, those of the tensor whose last values are kept); ``fill`` is the value before the first
    token.
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
    role: str = ""  # of keys: "key" or "value"
    ragged: bool = False  # of a state: see gatecc.ops.registry.Carry

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
    """Mark: a cumulative value ``x`` of the new positions, combined with the value before them."""
    raise NotImplementedError("a mark is written out before it runs")


def delayed(x: Any, slot: int) -> Any:
    """Mark: ``x``, as many positions earlier as the slot remembers."""
    raise NotImplementedError("a mark is written out before it runs")


def recalled(slot: int) -> Any:
    """Mark: the state that an operator starts from, zero before the first token."""
    raise NotImplementedError("a mark is written out before it runs")


def resumed(start: Any, slot: int) -> Any:
    """Mark: the state that an operator starts from, ``start`` before the first token."""
    raise NotImplementedError("a mark is written out before it runs")


STATES = (recalled, resumed)
MARKS = (kept, extended, carried, delayed, *STATES)
