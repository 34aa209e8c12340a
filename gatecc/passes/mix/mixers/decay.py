"""Decay: how fast a state forgets: the logarithm of what is left of it after a token, at most 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.ir.gates.option import Option
from gatecc.passes.mix.mixers.base import Place


@dataclass(frozen=True)
class Decay(Option, slot="decay"):
    """Base of decays. ``reads``: whether it is computed from hidden, from keys, or is constant."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The stages of the site that the module takes."""
        return ()

    @property
    def gate_normalizer(self) -> float | None:
        """That of ``linear_attention``: with one the module gives logits, without one log decays."""
        return None

    def module(self, place: Place) -> nn.Module:
        """A module of the stages in ``reads``: log decay (B, H, N, Dk) or (B, H, N, 1), or (1, H, 1, 1) if constant."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoDecay(Decay, tag="none"):
    """Nothing is forgotten."""

    def module(self, place: Place) -> nn.Module:
        raise AssertionError("nothing to make")


@dataclass(frozen=True)
class LowRank(Decay, tag="lowrank"):
    """logsigmoid(W2 W1 hidden + b) / normalizer, a key channel (GLA, Yang et al. 2024). ``bias`` is where b starts.

    With ``longest`` W2 starts at 0, and b so that the state of each channel halves within a number of tokens that grows
    by a constant factor over the channels of a head, from ``shortest`` to ``longest``: a spread of memories is a better
    start for a converted model than one for all.
    """

    rank: int = 16
    normalizer: float = 16.0
    bias: float = 0.0
    shortest: float = 2.0
    longest: float = 0.0

    def check(self) -> None:
        self.require(self.rank > 0, "rank", "a positive number")
        self.require(not self.longest or self.longest >= self.shortest > 0, "longest", "at least shortest, or 0")

    def start(self, heads: int, key: int) -> Tensor:
        """b: (heads * key,)."""
        if not self.longest:
            return torch.full((heads * key,), self.bias)
        first, last = math.log(self.shortest), math.log(self.longest)
        wanted = -math.log(2.0) / torch.linspace(first, last, key, dtype=torch.float64).exp() * self.normalizer
        return (wanted - torch.log(-torch.expm1(wanted))).float().repeat(heads)  # the inverse of logsigmoid

    @property
    def reads(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def gate_normalizer(self) -> float:
        return self.normalizer

    def module(self, place: Place) -> nn.Module:
        return _LowRank(self, place)


@dataclass(frozen=True)
class FromKeys(Decay, tag="keys"):
    """logsigmoid(k) / normalizer from the key before its rotary embedding: no parameters (Liger, Lan et al. 2025)."""

    normalizer: float = 16.0

    @property
    def reads(self) -> tuple[str, ...]:
        return ("k_raw",)

    @property
    def gate_normalizer(self) -> float:
        return self.normalizer

    def module(self, place: Place) -> nn.Module:
        return nn.Identity()


@dataclass(frozen=True)
class Retention(Decay, tag="retention"):
    """log(1 - 2^-(5+h)) for head h, constant (RetNet, Sun et al. 2023)."""

    def module(self, place: Place) -> nn.Module:
        return _Retention(place.heads)


@dataclass(frozen=True)
class Scalar(Decay, tag="scalar"):
    """-exp(A) softplus(W hidden + b), one number per head (Mamba-2, gated delta net).

    A starts at log U(0, 16) and softplus(b) log-uniform between 1e-3 and 0.1, as published. With ``start="slow"`` all
    heads begin at the slowest of these, which disturbs a converted model least.
    """

    start: Literal["published", "slow"] = "published"

    @property
    def reads(self) -> tuple[str, ...]:
        return ("hidden",)

    def module(self, place: Place) -> nn.Module:
        return _Scalar(self, place)


class _LowRank(nn.Module):
    def __init__(self, spec: LowRank, place: Place) -> None:
        super().__init__()
        self.heads = place.heads
        self.down = nn.Linear(place.dim, spec.rank, bias=False)
        self.up = nn.Linear(spec.rank, place.heads * place.key)
        with torch.no_grad():
            self.up.bias.copy_(spec.start(place.heads, place.key))
            if spec.longest:
                self.up.weight.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (B, N, C) -> (B, H, N, Dk)."""
        return self.up(self.down(hidden)).unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _Retention(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self) -> Tensor:
        """(1, H, 1, 1)."""
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(self.heads))).reshape(1, -1, 1, 1)


class _Scalar(nn.Module):
    def __init__(self, spec: Scalar, place: Place) -> None:
        super().__init__()
        heads = place.heads
        self.rate = nn.Linear(place.dim, heads)
        if spec.start == "slow":
            nn.init.zeros_(self.rate.weight)
            first, rate = torch.zeros(heads), torch.full((heads,), 1e-3)
        else:
            first = torch.empty(heads).uniform_(1e-3, 16).log()
            rate = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.log_a = nn.Parameter(first)
        with torch.no_grad():
            self.rate.bias.copy_(rate + torch.log(-torch.expm1(-rate)))  # the inverse of softplus

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (B, N, C) -> (B, H, N, 1)."""
        rate = F.softplus(self.rate(hidden).float())
        return (-self.log_a.float().exp() * rate).transpose(1, 2).unsqueeze(-1)
