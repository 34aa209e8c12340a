"""ScaleWeight: a constant factor of a value, moved into the weight that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gatecc.ir.weights.effect import Effect, Tensors, changed_in


@dataclass(frozen=True, eq=False)
class ScaleWeight(Effect):
    """Multiply a parameter by a power of two (so that dividing restores it bitwise)."""

    factor: float

    def apply(self, layer: nn.Module) -> dict[str, int]:
        layer.get_parameter(self.path).data.mul_(self.factor)
        return {}

    def undo(self, layer: nn.Module) -> None:
        layer.get_parameter(self.path).data.mul_(1 / self.factor)

    def describe(self, layer: nn.Module | None = None) -> str:
        return f"scale {self.path} by {self.factor:g}"

    def before(self, state: Tensors, same: Mapping[str, str]) -> Tensors:
        return changed_in(self.path, state, same, lambda t: t * (1 / self.factor))

    def to_json(self) -> list[Any]:
        return [*super().to_json(), self.factor]
