"""NewModule: a submodule that a layer did not have, filled from that layer's own weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from gatecc.errors import ArgumentError
from gatecc.ir.weights.effect import Effect, Ledger, Tensors, Values, holder_of, noise

Build = Callable[[], nn.Module]
Fill = Callable[[Any, nn.Module], None]


@dataclass(frozen=True, eq=False)
class NewModule(Effect):
    """A new submodule. ``build`` makes one, and ``fill(new, layer)`` writes what it takes from the weights of a layer.

    Every layer gets a module of its own: ``fill`` is called with that layer, so it reads that layer's weights.
    """

    build: Build | None = None
    fill: Fill | None = None
    edits_model: ClassVar[bool] = False

    def prepare(self, layer: nn.Module) -> None:
        holder, name = holder_of(layer, self.path)
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
            if any(p.is_meta for p in layer.parameters()):
                new.to("meta")  # what fills it is still to come
            elif self.fill is not None:
                with torch.no_grad():
                    self.fill(new, layer)
            _refuse_shared(self.path, new, layer)
            holder.add_module(name, new.train(holder.training))

    def apply(self, layer: nn.Module) -> dict[str, int]:
        self.prepare(layer)
        made = layer.get_submodule(self.path)
        return {f"{self.path}.{n}": p.numel() for n, p in made.named_parameters()}

    def undo(self, layer: nn.Module) -> None:
        holder, name = holder_of(layer, self.path)
        holder._modules.pop(name, None)

    def describe(self, layer: nn.Module | None = None) -> str:
        text = f"new {self.path}"
        if layer is None:
            return text
        made = layer.get_submodule(self.path).named_parameters()
        shapes = [f"{name} {' '.join(map(str, p.shape))}" for name, p in made]
        return f"{text}: {', '.join(shapes) or 'no parameters'}"

    def note(self, ledger: Ledger) -> None:
        ledger.own.add(self.path)

    def noisy(self, layer: nn.Module, generator: torch.Generator) -> Values:
        return {p: noise(p, generator) for p in layer.get_submodule(self.path).parameters()}

    def before(self, state: Tensors, same: Mapping[str, str]) -> Tensors:
        return {name: t for name, t in state.items() if not name.startswith(f"{self.path}.")}

    def placed(self, fqn: str) -> Effect:
        return NewModule(super().placed(fqn).path)  # closures hold graphs, and no file can


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
