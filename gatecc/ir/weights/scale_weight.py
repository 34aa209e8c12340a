"""ScaleWeight: a constant factor of a value, moved into the weight that reads it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from gatecc.ir.weights.effect import Effect, Ledger, Tensors, changed_in, holder_of, is_wrapped


@dataclass(frozen=True, eq=False)
class ScaleWeight(Effect):
    """Multiply a parameter by a power of two (so that dividing restores it bitwise)."""

    factor: float

    def apply(self, layer: nn.Module) -> dict[str, int]:
        layer.get_parameter(self.path).data.mul_(self.factor)
        return {}

    def undo(self, layer: nn.Module) -> None:
        layer.get_parameter(self.path).data.mul_(1 / self.factor)

    def note(self, ledger: Ledger) -> None:
        ledger.changes.append(self)

    @contextmanager
    def suspended(self, layer: nn.Module) -> Generator[None]:
        holder, name = holder_of(layer, self.path)
        scaled = layer.get_parameter(self.path)
        if is_wrapped(scaled):  # quantised since: other numbers, but graphs hold none
            yield
            return
        holder._parameters[name] = nn.Parameter(scaled.detach() * (1 / self.factor), scaled.requires_grad)
        try:
            yield
        finally:
            holder._parameters[name] = scaled

    def describe(self, layer: nn.Module | None = None) -> str:
        return f"scale {self.path} by {self.factor:g}"

    def before(self, state: Tensors, same: Mapping[str, str]) -> Tensors:
        return changed_in(self.path, state, same, lambda t: t * (1 / self.factor))

    def to_json(self) -> list[Any]:
        return [*super().to_json(), self.factor]
