"""Weights: what a rewrite does to the modules and parameters of a layer, as objects that can be done and undone.

An edit asks for effects (`Editor.module`, `Editor.scale_weight`, `Editor.widen`); the engine does them on every layer
that shares the edit's graph, records them with the model, and takes them back. It knows no kind of effect: a new kind
is a new class here and nothing elsewhere. Paths are relative to the layer until `placed` puts its name before them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gatecc.errors import ArgumentError, UnsupportedModelError
from gatecc.ir.widen import Rows, narrow, widen

Build = Callable[[], nn.Module]
Fill = Callable[[Any, nn.Module], None]
Values = dict[nn.Parameter, torch.Tensor]  # what parameters shall hold for a while
Tensors = dict[str, torch.Tensor]  # a state dict


class Ledger(Protocol):
    """What a scope remembers of its effects: paths of new modules, and weights that hold new rows."""

    own: set[str]
    widened: dict[str, Rows]


@dataclass(frozen=True, eq=False)
class Effect(ABC):
    """One change at ``path``: a module or a parameter. ``edits_model``: it changes a weight that the model had."""

    path: str
    edits_model: ClassVar[bool] = True

    @abstractmethod
    def apply(self, layer: nn.Module) -> dict[str, int]:
        """Do it on a layer, from that layer's own weights; returns the number of new elements by parameter path."""

    @abstractmethod
    def undo(self, layer: nn.Module) -> None:
        """Take it back, bitwise."""

    def check(self, layer: nn.Module) -> None:
        """Raise UnsupportedModelError if `undo` could not be done."""
        if self.edits_model:
            editable(layer, self.path)

    @abstractmethod
    def describe(self) -> str:
        """One line for a report."""

    def note(self, ledger: Ledger) -> None:
        """Enter it in what a scope remembers."""
        return

    def noisy(self, layer: nn.Module, generator: torch.Generator) -> Values:
        """What the parameters that it brought would hold with noise: a gate that starts at 1 then shows its effect."""
        return {}

    def before(self, state: Tensors, same: Mapping[str, str]) -> Tensors:
        """A state dict as it was without it, bitwise. ``same``: the first name of each tied parameter."""
        return state

    def to_json(self) -> list[Any]:
        """Plain data: the kind, the path and the numbers. Two effects are the same if this is."""
        return [type(self).__name__, self.path]

    def placed(self, fqn: str) -> Effect:
        """The same as plain data, from the root of a model whose layer ``fqn`` it belongs to: to undo, not to do."""
        return replace(self, path=".".join(p for p in (fqn, self.path) if p))


@dataclass(frozen=True, eq=False)
class NewModule(Effect):
    """A new submodule. ``build`` makes one, and ``fill(new, layer)`` writes what it takes from the weights of a layer.

    Every layer gets a module of its own: ``fill`` is called with that layer, so it reads that layer's weights.
    """

    build: Build | None = None
    fill: Fill | None = None
    edits_model: ClassVar[bool] = False

    def apply(self, layer: nn.Module) -> dict[str, int]:
        holder_path, _, name = self.path.rpartition(".")
        holder = layer.get_submodule(holder_path)
        if name not in holder._modules:
            if self.build is None:
                raise ValueError(f"{self.path}: a recorded effect cannot be done again")
            new = cast("object", self.build())  # what a user wrote may return anything
            if not isinstance(new, nn.Module):
                raise ArgumentError(
                    "the builder of a new module made something else",
                    where=self.path,
                    found=type(new).__name__,
                    expected="a torch.nn.Module",
                )
            if self.fill is not None:
                with torch.no_grad():
                    self.fill(new, layer)
            _refuse_shared(self.path, new, layer)
            holder.add_module(name, new.train(holder.training))
        made = layer.get_submodule(self.path)
        return {f"{self.path}.{n}": p.numel() for n, p in made.named_parameters()}

    def undo(self, layer: nn.Module) -> None:
        holder, _, name = self.path.rpartition(".")
        layer.get_submodule(holder)._modules.pop(name, None)

    def describe(self) -> str:
        return f"new {self.path}"

    def note(self, ledger: Ledger) -> None:
        ledger.own.add(self.path)

    def noisy(self, layer: nn.Module, generator: torch.Generator) -> Values:
        return {p: p.data + noise(p.data, generator) for p in layer.get_submodule(self.path).parameters()}

    def before(self, state: Tensors, same: Mapping[str, str]) -> Tensors:
        return {name: t for name, t in state.items() if not name.startswith(f"{self.path}.")}

    def placed(self, fqn: str) -> Effect:
        return NewModule(super().placed(fqn).path)  # closures hold graphs, and no file can


@dataclass(frozen=True, eq=False)
class ScaleWeight(Effect):
    """Multiply a parameter by a power of two (so that dividing restores it bitwise)."""

    factor: float

    def apply(self, layer: nn.Module) -> dict[str, int]:
        layer.get_parameter(self.path).data.mul_(self.factor)
        return {}

    def undo(self, layer: nn.Module) -> None:
        layer.get_parameter(self.path).data.mul_(1 / self.factor)

    def describe(self) -> str:
        return f"scale {self.path} by {self.factor:g}"

    def before(self, state: Tensors, same: Mapping[str, str]) -> Tensors:
        return _changed(self.path, state, same, lambda t: t * (1 / self.factor))

    def to_json(self) -> list[Any]:
        return [*super().to_json(), self.factor]


@dataclass(frozen=True, eq=False)
class WidenWeight(Effect):
    """Give a parameter new rows; ``fill`` makes their values: (groups*new, ...)."""

    rows: Rows
    fill: Callable[[], torch.Tensor] | None = None

    def apply(self, layer: nn.Module) -> dict[str, int]:
        if self.fill is None:
            raise ValueError(f"{self.path}: a recorded effect cannot be done again")
        more = self.fill()
        widen(layer, self.path, self.rows, more)
        return {self.path: more.numel()}

    def undo(self, layer: nn.Module) -> None:
        narrow(layer, self.path, self.rows)

    def describe(self) -> str:
        groups, old, new = self.rows
        return f"widen {self.path}: {groups} times [{old} rows | {new} rows of the gate]"

    def note(self, ledger: Ledger) -> None:
        ledger.widened[self.path] = self.rows

    def noisy(self, layer: nn.Module, generator: torch.Generator) -> Values:
        parameter = layer.get_parameter(self.path)
        new = parameter.data.unflatten(0, (self.rows.groups, -1))[:, self.rows.old :].flatten(0, 1)
        own = self.rows.narrow(parameter.data)
        return {parameter: self.rows.widen(own, new + noise(new, generator))}

    def before(self, state: Tensors, same: Mapping[str, str]) -> Tensors:
        return _changed(self.path, state, same, self.rows.narrow)

    def to_json(self) -> list[Any]:
        return [*super().to_json(), list(self.rows)]

    def placed(self, fqn: str) -> Effect:
        return WidenWeight(super().placed(fqn).path, self.rows)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a class that wraps others, so that its elements cannot be edited."""
    with unset_fake_temporarily():  # an edit that is traced looks at the live weight
        return is_traceable_wrapper_subclass(tensor.data)


def editable(layer: nn.Module, path: str) -> nn.Parameter:
    """A parameter whose elements can be edited. Raises UnsupportedModelError if it was quantised since."""
    holder, _, name = path.rpartition(".")
    module = layer.get_submodule(holder)
    parameter = module._parameters.get(name)
    if parameter is None or is_wrapped(parameter):
        raise UnsupportedModelError(
            "a weight that the rewrite changed holds no elements that can be edited any more",
            where=path,
            found=f"{type(module).__name__} without this parameter" if parameter is None else type(parameter).__name__,
            expected="an ordinary parameter",
            do="quantise last: revert, or call the model once in each kind of call, and then quantise it; or transform "
            "without fuse_into and folding, which change weights of the model",
        )
    return parameter


def noise(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise for a parameter: a matrix of it keeps the scale of what it multiplies, a vector of it is half a unit."""
    scale = 0.5 if x.dim() < 2 else (x.shape[0] / max(x.numel(), 1)) ** 0.5
    kind = x.dtype if x.is_floating_point() or x.is_complex() else torch.float32
    return (torch.randn(x.shape, generator=generator) * scale).to(device=x.device, dtype=kind)


def _changed(
    path: str, state: Tensors, same: Mapping[str, str], change: Callable[[torch.Tensor], torch.Tensor]
) -> Tensors:
    """A state dict with one parameter changed, under all of its names."""
    first = same.get(path, path)
    return {name: change(t.detach()) if same.get(name, name) == first else t for name, t in state.items()}


def _refuse_shared(path: str, new: nn.Module, layer: nn.Module) -> None:
    """Another tensor on the memory of a weight of the layer would be a tie that no state dict and no optimiser knows.

    The same Parameter is an ordinary tie, and is taken.
    """
    held = {_memory(t): (name, t) for name, t in (*layer.named_parameters(), *layer.named_buffers())}
    held.pop(None, None)
    for name, tensor in (*new.named_parameters(), *new.named_buffers()):
        other, known = held.get(_memory(tensor), ("", tensor))
        if known is not tensor:
            raise ArgumentError(
                "a new module shares the memory of a weight of the model",
                where=f"{path}.{name}",
                found=f"the memory of {other}",
                expected="parameters of its own",
                do="copy it: nn.Parameter(weight.detach().clone())",
            )


def _memory(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # a tensor subclass without memory of its own
        return None
