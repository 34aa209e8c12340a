"""Init: the parameters of a gate before training.

The last weights of a scorer are always called ``weight`` and ``bias``; init decides these. Inner weights start as in
``nn.Linear``, for if they were zero too nothing would ever move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ir.gates.option import Option
from gatecc.ir.program import attribute


@dataclass(frozen=True)
class Init(Option, slot="init"):
    """Base of inits."""

    def fill(self, params: Mapping[str, Tensor], start: float, constant: str) -> None:
        """Write ``weight`` and ``bias`` in place.

        ``start`` is the score at which the gate begins at 1; ``constant`` names the parameter that alone sets the
        score, where weight is not one: "bias", or "weight" if the scores are the weights themselves.
        """
        raise NotImplementedError

    def fill_from(self, gate: Any, layer: nn.Module) -> None:
        """Write what the gate takes from weights of the layer that it is for; most inits take nothing."""


@dataclass(frozen=True)
class Identity(Init, tag="identity"):
    """The gate is 1: weights 0, the bias such that the activation yields 1.

    ``how``: "auto" adapts the activation's scale where its value at 0 allows it (2σ, softmax times its size), and is
    exact; "fold" keeps a plain σ, which is ½, and leaves the factor 2 to the next linear (``spec.fold_factor``); "bias"
    saturates with ``bias``, at a residual that ``spec.contract()`` reports (σ(6) = 0.9975).
    """

    how: Literal["auto", "fold", "bias"] = "auto"
    bias: float = 6.0

    def fill(self, params: Mapping[str, Tensor], start: float, constant: str) -> None:
        params["weight"].zero_()
        params[constant].fill_(start) if constant in params else None


@dataclass(frozen=True)
class Zero(Init, tag="zero"):
    """Scores 0, weights and bias alike."""

    def fill(self, params: Mapping[str, Tensor], start: float, constant: str) -> None:
        _all(params, 0.0)


@dataclass(frozen=True)
class First(Init, tag="first"):
    """Scores 0, and ``bias`` for the first feature: a softmax begins with nearly all of its weight there."""

    bias: float = 6.0

    def fill(self, params: Mapping[str, Tensor], start: float, constant: str) -> None:
        _all(params, 0.0)
        params[constant].select(-1, 0).fill_(self.bias)


@dataclass(frozen=True)
class Uniform(Init, tag="uniform"):
    """U(-bound, bound); bound 0 means 1/sqrt(inputs), as in nn.Linear."""

    bound: float = 0.0

    def check(self) -> None:
        self.require(self.bound >= 0, "bound", "a number >= 0")

    def fill(self, params: Mapping[str, Tensor], start: float, constant: str) -> None:
        bound = self.bound or params["weight"][0].numel() ** -0.5
        for p in (params[name] for name in ("weight", "bias") if name in params):
            p.uniform_(-bound, bound)


@dataclass(frozen=True)
class Random(Init, tag="random"):
    """N(0, std²) weights; every bias is ``bias``."""

    std: float = 0.02
    bias: float = 0.0

    def check(self) -> None:
        self.require(self.std > 0, "std", "a positive number")

    def fill(self, params: Mapping[str, Tensor], start: float, constant: str) -> None:
        params["weight"].normal_(0.0, self.std)
        if "bias" in params:
            params["bias"].fill_(self.bias)


@dataclass(frozen=True)
class Reuse(Init, tag="reuse"):
    """A copy of a weight of the layer, by its name in the scope; the bias is 0."""

    name: str

    def fill(self, params: Mapping[str, Tensor], start: float, constant: str) -> None:
        _all(params, 0.0)

    def fill_from(self, gate: Any, layer: nn.Module) -> None:
        try:
            weight = attribute(layer, self.name)
        except AttributeError as e:
            have = ", ".join(name for name, _ in layer.named_parameters())
            raise ArgumentError(
                f"init=reuse({self.name}): the layer has no such weight", found=str(e), expected=f"one of {have}"[:300]
            ) from e
        gate.reuse(weight)


def _all(params: Mapping[str, Tensor], value: float) -> None:
    for name in ("weight", "bias"):
        if name in params:
            params[name].fill_(value)


@torch.no_grad()
def fill_inner(params: Mapping[str, Tensor]) -> None:
    """Inner weights as in nn.Linear: U(±1/sqrt(inputs)); inner biases 0."""
    for name, p in params.items():
        if name in ("weight", "bias"):
            continue
        if p.dim() < 2:
            p.zero_()
        else:
            p.uniform_(-(p[0].numel() ** -0.5), p[0].numel() ** -0.5)
