"""Widened weights, hidden while the module's own forward runs (gatecc.ir.weights makes and undoes them)."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from torch import nn

from gatecc.ir.weights import editable
from gatecc.ir.widen import Rows


@contextmanager
def narrowed(module: nn.Module, widened: Mapping[str, Rows]) -> Generator[None]:
    """The module with its own rows alone, as its forward was written for; the wide parameters come back afterwards.

    Raises UnsupportedModelError for weights that were quantised since.
    """
    wide = {path: editable(module, path) for path in widened}
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
