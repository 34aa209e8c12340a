"""Widening: new rows in an existing weight matrix, so that one matrix product yields a further value as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """How rows are laid out: ``groups`` times [``old`` rows of the model | ``new`` rows]. Biases likewise."""

    groups: int
    old: int
    new: int

    def widen(self, weight: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        """weight: (groups*old, ...), more: (groups*new, ...) -> (groups*(old+new), ...)"""
        parts = [t.unflatten(0, (self.groups, -1)) for t in (weight, more.to(weight))]
        return torch.cat(parts, 1).flatten(0, 1)

    def narrow(self, weight: torch.Tensor) -> torch.Tensor:
        """The model's own rows of a widened weight, bitwise: (groups*(old+new), ...) -> (groups*old, ...)"""
        return weight.unflatten(0, (self.groups, -1))[:, : self.old].flatten(0, 1)


@dataclass(frozen=True, eq=False)
class WidenWeight:
    """Give an existing parameter new rows; ``fill`` makes their values: (groups*new, ...)."""

    path: str
    rows: Rows
    fill: Callable[[], torch.Tensor]


def own_features(wide: torch.Tensor, groups: int, old: int, new: int) -> torch.Tensor:
    """What the linear yielded before: (..., groups*(old+new)) -> (..., groups*old)"""
    return wide.unflatten(-1, (groups, old + new))[..., :old].flatten(-2)


def new_features(wide: torch.Tensor, groups: int, old: int, new: int) -> torch.Tensor:
    """What the new rows yield: (..., groups*(old+new)) -> (..., groups*new)"""
    return wide.unflatten(-1, (groups, old + new))[..., old:].flatten(-2)
