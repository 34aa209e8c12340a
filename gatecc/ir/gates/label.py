"""Label: what a supervised gate should have said, computed from the value that it gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gatecc.ir.gates.option import Option


@dataclass(frozen=True)
class Label(Option, slot="label"):
    """Base of labels."""

    def __call__(self, response: Tensor) -> Tensor:
        """response: (..., F), the mass that each feature carries -> labels in {0, 1} of the same shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class TopKMass(Label, tag="topk_mass"):
    """1 for the fewest features whose mass reaches the fraction r of the whole (Fire Together Wire Together)."""

    r: float = 0.9

    def check(self) -> None:
        self.require(0 < self.r <= 1, "r", "0 < r <= 1")

    def __call__(self, response: Tensor) -> Tensor:
        return topk_mass(response, self.r)


def topk_mass(response: Tensor, r: float) -> Tensor:
    """response: (..., F), not negative -> 1 for the fewest largest entries whose sum is at least r of the whole, else
    0.

    r = 1 labels every feature, those without mass too: then nothing is pruned.
    """
    if r >= 1:
        return torch.ones_like(response)
    mass, order = response.sort(-1, descending=True)
    before = mass.cumsum(-1) - mass
    keep = before < r * mass.sum(-1, keepdim=True)
    return torch.zeros_like(response).scatter(-1, order, keep.to(response.dtype))
