"""Split: a weight of the model becomes several parameters, such as the rows of a feed-forward layer as experts."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from gatecc.ir.weights.effect import Effect, Ledger, Tensors, editable, holder_of, joined


@dataclass(frozen=True, eq=False)
class Split(Effect):
    """Cut a parameter along ``axis`` into parts of ``sizes``: ``into`` is a new ParameterList of them.

    The parts are the model's weight, not new ones: they start from it, and undoing joins what they hold by then.
    """

    into: str
    axis: int
    sizes: tuple[int, ...]
    keeps_forward: ClassVar[bool] = False

    def prepare(self, layer: nn.Module) -> None:
        holder, name = holder_of(layer, self.into)
        if name not in holder._modules:
            weight = editable(layer, self.path)
            parts = [nn.Parameter(part, requires_grad=weight.requires_grad) for part in self._cut(weight)]
            holder.add_module(name, nn.ParameterList(parts).train(holder.training))

    def apply(self, layer: nn.Module) -> dict[str, int]:
        self.prepare(layer)
        holder, name = holder_of(layer, self.path)
        made: dict[str, int] = {}
        for number, part in enumerate(self._cut(editable(layer, self.path))):  # it may have changed since
            parameter = layer.get_parameter(self._part(number))
            parameter.data = part
            made[self._part(number)] = part.numel()
        holder._parameters[name] = None
        return made

    def undo(self, layer: nn.Module) -> None:
        holder, name = holder_of(layer, self.path)
        if holder._parameters[name] is None:
            holder._parameters[name] = self._joined(layer)
        holder, name = holder_of(layer, self.into)
        holder._modules.pop(name, None)

    @property
    def gone(self) -> tuple[str, ...]:
        return (self.path,)

    def check(self, layer: nn.Module) -> None:
        for number in range(len(self.sizes)):
            editable(layer, self._part(number))

    @contextmanager
    def suspended(self, layer: nn.Module) -> Generator[None]:
        holder, name = holder_of(layer, self.path)
        holder._parameters[name] = self._joined(layer)
        try:
            yield
        finally:
            holder._parameters[name] = None

    def describe(self, layer: nn.Module | None = None) -> str:
        return f"split {self.path}: axis {self.axis} into {self.into} of {', '.join(map(str, self.sizes))}"

    def note(self, ledger: Ledger) -> None:
        ledger.own.add(self.into)
        ledger.changes.append(self)

    def before(self, state: Tensors, same: Mapping[str, str]) -> Tensors:
        parts = [self._part(number) for number in range(len(self.sizes))]
        rest = {name: t for name, t in state.items() if name not in parts}
        return {**rest, self.path: torch.cat([state[name].detach() for name in parts], self.axis)}

    def to_json(self) -> list[Any]:
        return [*super().to_json(), self.into, self.axis, list(self.sizes)]

    @classmethod
    def of(cls, path: str, *numbers: Any) -> Split:
        into, axis, sizes = numbers
        return cls(path, into, axis, tuple(sizes))

    def placed(self, fqn: str) -> Effect:
        return replace(self, path=joined(fqn, self.path), into=joined(fqn, self.into))

    def _part(self, number: int) -> str:
        return f"{self.into}.{number}"

    def _cut(self, weight: torch.Tensor) -> list[torch.Tensor]:
        return [part.clone() for part in weight.detach().split(list(self.sizes), self.axis)]

    def _joined(self, layer: nn.Module) -> nn.Parameter:
        parts = [editable(layer, self._part(number)) for number in range(len(self.sizes))]
        whole = torch.cat([part.detach() for part in parts], self.axis)
        return nn.Parameter(whole, requires_grad=parts[0].requires_grad)
