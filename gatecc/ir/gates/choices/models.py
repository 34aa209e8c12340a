"""Choices between whole models: all of them independently, those of an allowed subset, the one with the least predicted
loss plus cost, one of two by a threshold, two blended by a threshold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.choice import Buffers, Choice, Chosen


@dataclass(frozen=True)
class Independent(Choice, tag="independent"):
    """Every expert with weight σ(logit): weights do not compete, and do not sum to 1."""

    def slots(self, experts: int) -> int:
        return experts

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        return Chosen(torch.sigmoid(logits), _everyone(logits))


@dataclass(frozen=True)
class Among(Choice, tag="among"):
    """Softmax over the experts that the buffer ``allowed`` (E,) marks; the slots of the others are empty.

    The weights are those of all experts, restricted and divided by their sum.
    """

    @property
    def sums_to_one(self) -> bool:
        return True

    def slots(self, experts: int) -> int:
        return experts

    def buffers(self, experts: int) -> dict[str, Tensor]:
        return {"allowed": torch.ones(experts, dtype=torch.bool)}

    def probabilities(self, logits: Tensor, buffers: Buffers) -> Tensor:
        return torch.softmax(logits.masked_fill(~buffers["allowed"], float("-inf")), -1)

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        indices = torch.where(buffers["allowed"], _everyone(logits), logits.size(-1))
        return Chosen(self.probabilities(logits, buffers), indices)


@dataclass(frozen=True)
class Least(Choice, tag="least"):
    """The expert with the least logit + cost, weight 1: logits are predicted losses, the buffer ``cost`` (E,) is
    Σ λ_j c_j.

    The choice has no gradient: the predictions are trained on measured losses.
    """

    @property
    def sums_to_one(self) -> bool:
        return True

    def slots(self, experts: int) -> int:
        return 1

    def buffers(self, experts: int) -> dict[str, Tensor]:
        return {"cost": torch.zeros(experts)}

    def probabilities(self, logits: Tensor, buffers: Buffers) -> Tensor:
        return torch.softmax(-(logits + buffers["cost"]), -1)

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        total = logits.detach() + buffers["cost"]
        weight = torch.where(torch.isfinite(total).all(-1, keepdim=True), 1.0, float("nan"))  # argmin would hide a NaN
        return Chosen(weight, total.argmin(-1, keepdim=True))


@dataclass(frozen=True)
class Defer(Choice, tag="defer"):
    """The second of two experts where softmax(logits)₁ >= t, else the first; t is the buffer ``threshold``.

    The weight is 1, with the gradient of the probability of what was chosen.
    """

    t: float = 0.5

    @property
    def sums_to_one(self) -> bool:
        return True

    def slots(self, experts: int) -> int:
        return 1 if _two(experts, self) else 0

    def buffers(self, experts: int) -> dict[str, Tensor]:
        return {"threshold": torch.tensor(self.t)}

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        p = torch.softmax(logits, -1)
        second = p[:, 1:] >= buffers["threshold"]
        chosen = torch.where(second, p[:, 1:], p[:, :1])
        return Chosen(1.0 + (chosen - chosen.detach()), second.long())


@dataclass(frozen=True)
class Blend(Choice, tag="blend"):
    """Both of two experts, the second with g = σ((t - s) / T), the first with 1 - g; s is the score of the first.

    t and T are the buffers ``threshold`` and ``temperature``, found by a sweep over validation data.
    """

    t: float = 0.5
    T: float = 0.1

    def check(self) -> None:
        self.require(self.T > 0, "T", "a positive number")

    @property
    def sums_to_one(self) -> bool:
        return True

    def slots(self, experts: int) -> int:
        return 2 if _two(experts, self) else 0

    def buffers(self, experts: int) -> dict[str, Tensor]:
        return {"threshold": torch.tensor(self.t), "temperature": torch.tensor(self.T)}

    def probabilities(self, logits: Tensor, buffers: Buffers) -> Tensor:
        g = torch.sigmoid((buffers["threshold"] - logits[:, :1]) / buffers["temperature"])
        return torch.cat([1 - g, g], -1)

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        return Chosen(self.probabilities(logits, buffers), _everyone(logits))


def _everyone(logits: Tensor) -> Tensor:
    return torch.arange(logits.size(-1), device=logits.device).expand(logits.shape)


def _two(experts: int, choice: Choice) -> bool:
    if experts != 2:
        raise ArgumentError(f"{choice.tag} chooses between two experts", found=str(experts), expected="2")
    return True
