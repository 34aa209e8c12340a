"""Widening: new rows or columns in an existing weight matrix, which then yields or reads a further value as well."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class Rows(NamedTuple):
    """How rows are laid out: ``groups`` times [``old`` rows of the model | ``new`` rows]. Biases likewise.

    On ``axis`` 1 they are columns: inputs of the matrix instead of outputs.
    """

    groups: int
    old: int
    new: int
    axis: int = 0

    @property
    def size(self) -> int:
        """The size of the axis with the new rows."""
        return self.groups * (self.old + self.new)

    def widen(self, weight: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        """weight: (groups*old, ...), more: (groups*new, ...) -> (groups*(old+new), ...)"""
        parts = [t.unflatten(self.axis, (self.groups, -1)) for t in (weight, more.to(weight))]
        return torch.cat(parts, self.axis + 1).flatten(self.axis, self.axis + 1)

    def narrow(self, weight: torch.Tensor) -> torch.Tensor:
        """The model's own rows of a widened weight, bitwise: (groups*(old+new), ...) -> (groups*old, ...)"""
        return self._part(weight, 0, self.old).flatten(self.axis, self.axis + 1)

    def more(self, weight: torch.Tensor) -> torch.Tensor:
        """A view of the new rows of a widened weight: (groups*(old+new), ...) -> (groups, new, ...)"""
        return self._part(weight, self.old, self.new)

    def _part(self, weight: torch.Tensor, start: int, size: int) -> torch.Tensor:
        return weight.unflatten(self.axis, (self.groups, -1)).narrow(self.axis + 1, start, size)


def widen(root: nn.Module, path: str, rows: Rows, more: torch.Tensor) -> None:
    """Add rows to a parameter in place: it stays the same Parameter, so ties and optimisers hold it still."""
    parameter = root.get_parameter(path)
    parameter.data = rows.widen(parameter.data, more)
    _resized(root, path, rows.axis, parameter)


def narrow(root: nn.Module, path: str, rows: Rows) -> None:
    """The inverse of widen, bitwise."""
    parameter = root.get_parameter(path)
    parameter.data = rows.narrow(parameter.data)
    _resized(root, path, rows.axis, parameter)


def own_features(wide: torch.Tensor, groups: int, old: int, new: int) -> torch.Tensor:
    """What the linear yielded before: (..., groups*(old+new)) -> (..., groups*old)"""
    return wide.unflatten(-1, (groups, old + new))[..., :old].flatten(-2)


def new_features(wide: torch.Tensor, groups: int, old: int, new: int) -> torch.Tensor:
    """What the new rows yield: (..., groups*(old+new)) -> (..., groups*new)"""
    return wide.unflatten(-1, (groups, old + new))[..., old:].flatten(-2)


def _resized(root: nn.Module, path: str, axis: int, parameter: nn.Parameter) -> None:
    """A gradient of the old shape is void, and nn.Linear says how many features it reads and yields."""
    parameter.grad = None
    linear = root.get_submodule(path.rpartition(".")[0])
    if isinstance(linear, nn.Linear):
        setattr(linear, ("out_features", "in_features")[axis], parameter.shape[axis])
