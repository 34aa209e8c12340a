"""Softmax over the experts, of which the k largest run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.ir.gates.anneal import Anneal, first, least
from gatecc.ir.gates.choice import BIAS, Buffers, Choice, Chosen, at_most, largest

Squash = Literal["none", "tanh", "sigmoid", "gelu"]
_SQUASH = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": F.gelu}


@dataclass(frozen=True)
class SoftmaxTopK(Choice, tag="softmax_topk"):
    """The k largest of softmax(pre_activation(logits) / T); with ``renorm`` divided by their sum.

    With ``renorm`` that is Mixtral's, and equal to the softmax over the k largest logits alone (Granite); without it
    Switch's and Qwen2-MoE's. ``T`` is a number, a schedule (``T=exponential(2.0, 0.5, 1000)``) or, with
    ``learned_T``, a parameter that starts there: learning it slows the estimation of the experts to as little as
    1 / log(n), unless the scores go through a ``pre_activation`` first (temperature in softmax Gaussian MoE, 2024).
    """

    biased: ClassVar[bool] = True
    k: int
    renorm: bool = True
    T: float | Anneal = 1.0
    pre_activation: Squash = "none"
    learned_T: bool = False

    def check(self) -> None:
        self.require(self.k > 0, "k", "a positive integer")
        self.require(least(self.T) > 0, "T", "a positive number")
        self.require(not (self.learned_T and isinstance(self.T, Anneal)), "T", "a number where it is learned")

    @property
    def sums_to_one(self) -> bool:
        return self.renorm

    @property
    def annealed(self) -> Mapping[str, float | Anneal]:
        return {} if self.learned_T or self.T == 1.0 else {"temperature": self.T}

    @property
    def note(self) -> str:
        if not self.learned_T or self.pre_activation != "none":
            return ""
        return (
            "the temperature of the router is learned together with linear scores, which slows the estimation of the "
            "experts to as little as 1 / log(n): pre_activation=tanh restores a polynomial rate, a constant or a "
            "schedule T=exponential(start, end, steps) avoids it"
        )

    def slots(self, experts: int) -> int:
        return at_most(self.k, experts)

    def parameters(self, experts: int) -> dict[str, Tensor]:
        return {"log_temperature": torch.tensor(first(self.T)).log()} if self.learned_T else {}

    def probabilities(self, logits: Tensor, buffers: Buffers) -> Tensor:
        return torch.softmax(self.tempered(logits, buffers), -1)

    def __call__(self, logits: Tensor, buffers: Buffers, training: bool) -> Chosen:
        z = self.tempered(logits, buffers)
        bias = buffers.get(BIAS)
        indices = largest(z if bias is None else torch.softmax(z, -1) + bias, self.k)
        if self.renorm:
            return Chosen(torch.softmax(z.gather(-1, indices), -1), indices)
        return Chosen(torch.softmax(z, -1).gather(-1, indices), indices)

    def tempered(self, logits: Tensor, buffers: Buffers) -> Tensor:
        """What the softmax is taken of."""
        z = logits if self.pre_activation == "none" else _SQUASH[self.pre_activation](logits)
        if self.learned_T:
            return z * torch.exp(-buffers["log_temperature"].float())
        return z / buffers["temperature"] if "temperature" in buffers else z
