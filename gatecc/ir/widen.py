"""Widening: new rows in an existing weight matrix, so that one matrix product yields a further value as well."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


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


def widen(root: nn.Module, path: str, rows: Rows, more: torch.Tensor) -> None:
    """Add rows to a parameter in place: it stays the same Parameter, so ties and optimisers hold it still."""
    parameter = root.get_parameter(path)
    parameter.data = rows.widen(parameter.data, more)
    _resized(root, path, parameter)


def narrow(root: nn.Module, path: str, rows: Rows) -> None:
    """The inverse of widen, bitwise."""
    parameter = root.get_parameter(path)
    parameter.data = rows.narrow(parameter.data)
    _resized(root, path, parameter)


def own_features(wide: torch.Tensor, groups: int, old: int, new: int) -> torch.Tensor:
    """What the linear yielded before: (..., groups*(old+new)) -> (..., groups*old)"""
    return wide.unflatten(-1, (groups, old + new))[..., :old].flatten(-2)


def new_features(wide: torch.Tensor, groups: int, old: int, new: int) -> torch.Tensor:
    """What the new rows yield: (..., groups*(old+new)) -> (..., groups*new)"""
    return wide.unflatten(-1, (groups, old + new))[..., old:].flatten(-2)


def _resized(root: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """A gradient of the old shape is void, and nn.Linear says how many features it yields."""
    parameter.grad = None
    linear = root.get_submodule(path.rpartition(".")[0])
    if isinstance(linear, nn.Linear):
        linear.out_features = parameter.shape[0]
