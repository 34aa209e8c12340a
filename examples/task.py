"""What the demo needs to know of a model: what to put where, what must stay equal, and what the gates should learn."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

import gatecc


class Task(Protocol):
    """A model in eval mode with its example inputs and something to learn. Texts are for the reader."""

    title: str
    about: str  # what the gates learn from
    skipped: str  # what the demo cannot do with this model, and why; empty for nothing
    model: nn.Module
    inputs: Any  # example inputs, as gatecc takes them

    def recipe(self, report: gatecc.Report) -> gatecc.Recipe:
        """The gates to insert, given what an inspection found."""
        ...

    def probes(self) -> list[Any]:
        """Example inputs of several sizes, on which promises of equality are measured."""
        ...

    def start(self, model: nn.Module) -> str:
        """Prepare the gates for training; returns what they are about to learn."""
        ...

    def loss(self, model: nn.Module) -> Tensor:
        """The loss of the next batch."""
        ...

    def measure(self, model: nn.Module) -> dict[str, str]:
        """Figures that training should better, on data that it does not see."""
        ...

    def similarities(self, model: nn.Module) -> list[tuple[str, str, float]]:
        """Two texts and their similarity; empty for a model that reads no text."""
        ...
