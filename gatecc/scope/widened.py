"""Widened weights: made when a rewrite is installed, undone by revert, hidden while the module's own forward runs."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from gatecc.ir.widen import Rows


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


@contextmanager
def narrowed(module: nn.Module, widened: Mapping[str, Rows]) -> Generator[None]:
    """The module with its own rows alone, as its forward was written for; the wide parameters come back afterwards."""
    wide = {path: module.get_parameter(path) for path in widened}
    try:
        for path, parameter in wide.items():
            own = widened[path].narrow(parameter.detach())
            _put(module, path, nn.Parameter(own, requires_grad=parameter.requires_grad))
        yield
    finally:
        for path, parameter in wide.items():
            _put(module, path, parameter)


def _put(root: nn.Module, path: str, parameter: nn.Parameter) -> None:
    holder, _, name = path.rpartition(".")
    root.get_submodule(holder)._parameters[name] = parameter


def _resized(root: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """A gradient of the old shape is void, and nn.Linear says how many features it yields."""
    parameter.grad = None
    linear = root.get_submodule(path.rpartition(".")[0])
    if isinstance(linear, nn.Linear):
        linear.out_features = parameter.shape[0]
