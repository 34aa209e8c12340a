"""Drop: a submodule, parameter or buffer of the model that the rewritten graph no longer reads leaves the layer."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from gatecc.errors import UnsupportedModelError
from gatecc.ir.weights.aside import is_aside, lent, put_back, take_out
from gatecc.ir.weights.effect import Effect, Ledger


@dataclass(frozen=True, eq=False)
class Drop(Effect):
    """Take ``path`` out of the layer: no parameter, no entry of the state dict, no gradient. It is kept aside."""

    keeps_forward: ClassVar[bool] = False

    def apply(self, layer: nn.Module) -> dict[str, int]:
        take_out(layer, self.path)
        return {}

    def undo(self, layer: nn.Module) -> None:
        put_back(layer, self.path)

    @property
    def gone(self) -> tuple[str, ...]:
        return (self.path,)

    def changed(self, model: nn.Module) -> list[str]:
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        return [name for name in names if f"{name}.".startswith(f"{self.path}.")]

    def check(self, layer: nn.Module) -> None:
        if not is_aside(layer, self.path):
            raise UnsupportedModelError(
                "what the rewrite took out of the model is not kept any more",
                where=self.path,
                found="its layer was replaced, or made anew",
                expected="the module that transform gave back",
                do="make the model anew; wrap or swap modules of a transformed model with those that it has",
            )
        with lent(layer, self.path):
            gone = [n for n in self.changed(layer) if layer.get_parameter(n).is_meta]
            if gone and not all(p.is_meta for p in layer.parameters()):
                raise UnsupportedModelError(
                    "what the rewrite took out of the model was never loaded",
                    where=gone[0],
                    found="device meta",
                    do="gatecc.materialise(model, weights) loads the weights of the model before the rewrite",
                )

    @contextmanager
    def suspended(self, layer: nn.Module) -> Generator[None]:
        with lent(layer, self.path):
            yield

    def describe(self, layer: nn.Module | None = None) -> str:
        return f"drop {self.path}"

    def note(self, ledger: Ledger) -> None:
        ledger.changes.append(self)
