"""Aside: where what an effect took out of a layer is kept.

It is among neither the parameters nor the state dict of the layer, but moves, is cast, copied and pickled with it. The
place that it had stays in the layer as None, as for a Linear without a bias, so that putting it back keeps the order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gatecc.ir.weights.effect import Tensors, holder_of

NAME = "_gatecc_aside"
TABLES = ("_parameters", "_buffers", "_modules")


class Aside(nn.Module):
    """``box`` holds the things themselves, each under its path from the module that the Aside lies on."""

    box: nn.Module

    def __init__(self) -> None:
        super().__init__()
        vars(self)["box"] = nn.Module()  # past __setattr__: nobody who walks over modules finds it

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Aside:
        def kept(x: torch.Tensor) -> torch.Tensor:  # what holds nothing gets no memory when the model does: to_empty
            return fn(x).to("meta") if x.is_meta else fn(x)

        self.box._apply(kept)
        super()._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> Aside:
        self.box.train(mode)
        super().train(mode)
        return self

    def forward(self, x: Any) -> Any:
        """A Sequential runs whatever lies on it, this too, where its own code is run to compare a graph with it."""
        return x

    def extra_repr(self) -> str:
        return ", ".join(path for table in TABLES for path in getattr(self.box, table))


def take_out(layer: nn.Module, path: str) -> None:
    """Take a submodule, parameter or buffer out of a layer and keep it."""
    holder, name = holder_of(layer, path)
    table = _table(holder, name)
    aside = layer._modules.setdefault(NAME, Aside().train(layer.training))
    assert isinstance(aside, Aside)
    getattr(aside.box, table)[path] = getattr(holder, table)[name]
    if name in holder._non_persistent_buffers_set:
        aside.box._non_persistent_buffers_set.add(path)
    getattr(holder, table)[name] = None


def put_back(root: nn.Module, path: str) -> None:
    """The inverse of `take_out`, from the layer or from a module around it; nothing if the thing is in its place."""
    found = _find(root, path)
    if found is None:
        return
    layer, aside, table, inner = found
    holder, name = holder_of(root, path)
    getattr(holder, table)[name] = getattr(aside.box, table).pop(inner)
    aside.box._non_persistent_buffers_set.discard(inner)
    if not any(getattr(aside.box, table) for table in TABLES):
        del layer._modules[NAME]


def is_aside(root: nn.Module, path: str) -> bool:
    """Whether what was at a path was taken out and is kept."""
    return _find(root, path) is not None


@contextmanager
def lent(layer: nn.Module, path: str) -> Generator[None]:
    """What is kept, in its place for a while."""
    found = _find(layer, path)
    if found is None:
        yield
        return
    _, aside, table, inner = found
    holder, name = holder_of(layer, path)
    getattr(holder, table)[name] = getattr(aside.box, table)[inner]
    try:
        yield
    finally:
        getattr(holder, table)[name] = None


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model, and those that were taken out of it."""
    for module in model.modules():
        yield module
        if isinstance(module, Aside):
            yield from (kept for kept in module.box.modules() if kept is not module.box)


def aside_state(model: nn.Module) -> Tensors:
    """The tensors that are kept aside in a model, under the names that they had."""
    return {name: t for prefix, aside in _all(model) for name, t in aside.box.state_dict(prefix=prefix).items()}


def load_aside(model: nn.Module, state: Tensors) -> Tensors:
    """Fill what is kept aside from a state dict; returns the rest of it, which is the model's own."""
    rest = dict(state)
    for prefix, aside in _all(model):
        own = {name: rest.pop(prefix + name) for name in aside.box.state_dict()}
        aside.box.load_state_dict(own, strict=False)  # strict, it knows no parameter with a dot in its name
    return rest


def _all(model: nn.Module) -> Iterator[tuple[str, Aside]]:
    for name, module in model.named_modules():
        if isinstance(module, Aside):
            yield name.removesuffix(NAME), module


def _table(holder: nn.Module, name: str) -> str:
    found = next((table for table in TABLES if getattr(holder, table).get(name) is not None), None)
    if found is None:
        raise AttributeError(f"{type(holder).__name__} holds no {name}")
    return found


def _find(root: nn.Module, path: str) -> tuple[nn.Module, Aside, str, str] | None:
    """The module with the Aside that keeps what was at a path, the Aside, the table, and the path in it."""
    layer: Any = root
    steps = path.split(".")
    while isinstance(layer, nn.Module):
        aside = layer._modules.get(NAME)
        inner = ".".join(steps)
        if isinstance(aside, Aside):
            table = next((t for t in TABLES if inner in getattr(aside.box, t)), None)
            if table is not None:
                return layer, aside, table, inner
        if not steps:
            return None
        layer = layer._modules.get(steps.pop(0))
    return None
