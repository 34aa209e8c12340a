"""WidenWeight, WidenColumns: new rows or columns in a weight of the model, so that one matrix product yields or reads a
further value as well."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from gatecc.ir.weights.effect import Effect, Ledger, Tensors, Values, changed_in, editable, holder_of, noisy_part
from gatecc.ir.widen import Rows, narrow, widen


@dataclass(frozen=True, eq=False)
class WidenWeight(Effect):
    """Give a parameter new rows; ``fill`` makes their values: (groups*new, ...)."""

    axis: ClassVar[int] = 0

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

    def describe(self, layer: nn.Module | None = None) -> str:
        groups, old, new = self.rows[:3]
        return f"widen {self.path}: {groups} times [{old} rows | {new} rows of the gate]"

    def note(self, ledger: Ledger) -> None:
        ledger.changes.append(self.placed(""))

    @contextmanager
    def suspended(self, layer: nn.Module) -> Generator[None]:
        wide = editable(layer, self.path)
        holder, name = holder_of(layer, self.path)
        own = self.rows.narrow(wide.detach())
        holder._parameters[name] = nn.Parameter(own, requires_grad=wide.requires_grad)
        try:
            yield
        finally:
            holder._parameters[name] = wide

    def noisy(self, layer: nn.Module, generator: torch.Generator) -> Values:
        parameter = layer.get_parameter(self.path)
        new, axis = self.rows.more(parameter.detach()), self.rows.axis
        return {parameter: noisy_part(new, generator, new.flatten(axis, axis + 1).shape)}

    def before(self, state: Tensors, same: Mapping[str, str]) -> Tensors:
        return changed_in(self.path, state, same, self.rows.narrow)

    def to_json(self) -> list[Any]:
        return [*super().to_json(), list(self.rows[:3])]

    @classmethod
    def of(cls, path: str, *numbers: Any) -> WidenWeight:
        return cls(path, Rows(*numbers[0], axis=cls.axis))

    def placed(self, fqn: str) -> Effect:
        return type(self)(super().placed(fqn).path, self.rows)


@dataclass(frozen=True, eq=False)
class WidenColumns(WidenWeight):
    """Give a parameter new columns, for a value that is concatenated to what it read; ``fill``: (..., groups*new).

    The layer's own code hands it the value alone, so that it cannot run any more.
    """

    axis: ClassVar[int] = 1
    keeps_forward: ClassVar[bool] = False

    def describe(self, layer: nn.Module | None = None) -> str:
        groups, old, new = self.rows[:3]
        return f"widen {self.path}: {groups} times [{old} columns | {new} columns of the branch]"
