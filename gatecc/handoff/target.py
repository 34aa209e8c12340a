"""Target: an architecture of transformers that a rewritten model may be. One file in gatecc/handoff/targets each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor

from gatecc.handoff.mixture import Mixture
from gatecc.handoff.source import Source
from gatecc.handoff.unfit import UnfitError

TARGETS: dict[str, Target] = {}


class Target(ABC):
    """``prefix``: of the class names, "Mixtral" for MixtralForCausalLM and MixtralConfig. A subclass is known by being
    there, under ``name``, its model_type."""

    name: ClassVar[str]
    prefix: ClassVar[str]
    windowed: ClassVar[bool] = False  # reads sliding_window of its configuration

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        TARGETS[cls.name] = cls()

    @abstractmethod
    def options(self, source: Source) -> dict[str, Any]:
        """The options of the configuration beside those that all decoders share. Raises UnfitError."""

    @abstractmethod
    def state(self, source: Source) -> dict[str, Tensor]:
        """The state dict of the class. That its names and shapes are those of the class is checked by who asks, so a
        bias or a norm that the class lacks need not be looked for here."""


def alike(
    source: Source, *, dense: bool, scores: Literal["softmax", "sigmoid"] = "softmax", shared: bool = False
) -> Mixture:
    """One of the mixtures of a model that all have one shape, in every layer if the class has no ``dense`` ones;
    without a shared expert if the class has none. Raises UnfitError."""
    if not source.mixtures:
        raise UnfitError("the model has no experts")
    if source.dense and not dense:
        raise UnfitError(f"it has experts in every layer, the model none in layer {', '.join(map(str, source.dense))}")
    first = next(iter(source.mixtures.values()))
    shapes = {mixture.shape for mixture in source.mixtures.values()}
    if len(shapes) > 1:
        raise UnfitError(f"its layers are alike, the model's have (experts, width, k, renorm, ...) {sorted(shapes)}")
    if first.scores != scores:
        raise UnfitError(f"it weighs experts by a {scores}, the model by a {first.scores}")
    if not shared and any(mixture.shared for mixture in source.mixtures.values()):
        raise UnfitError("it has no shared expert")
    if set(source.mixtures) != {f"{layer}.mlp" for layer in source.layers if source.mixture_of(layer)}:
        raise UnfitError(
            f"its experts take the place of each layer's mlp, the model's are in {', '.join(source.mixtures)}"
        )
    return first


def ungated(source: Source) -> None:
    """Raises UnfitError where attention has gates, or is no softmax attention any more."""
    if source.deltas:
        raise UnfitError(
            f"its attention is softmax attention, the model's is none in {', '.join(sorted(source.deltas))}"
        )
    if source.gates:
        raise UnfitError(f"its attention has no gates, the model's has in {', '.join(sorted(source.gates))}")


def stacked(source: Source) -> dict[str, Tensor]:
    """Router and experts of every mixture under the names that transformers has for them."""
    found: dict[str, Tensor] = {}
    for owner, mixture in source.mixtures.items():
        found |= {
            f"{owner}.gate.weight": mixture.router,
            f"{owner}.experts.gate_up_proj": mixture.gate_up,
            f"{owner}.experts.down_proj": mixture.down,
        }
    return found
