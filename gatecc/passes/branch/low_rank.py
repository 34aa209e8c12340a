"""Low-rank adapters (LoRA): one, or a bank of several that are weighed for each position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc.ir.edit import Editor
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.body import Adapting, Bank, Body, operand
from gatecc.passes.branch.weighted import weighted_sum
from gatecc.passes.operands import beside


@dataclass(frozen=True)
class Lora(Adapting, Body, tag="lora"):
    """y <- y + alpha/rank * B A x (Hu et al., 2021). B starts at 0. ``of`` is the stage that it reads: x."""

    rank: int = 8
    alpha: float = 16.0
    of: str = "in"

    def check(self) -> None:
        self.require(self.rank > 0, "rank", "a positive integer")

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        source, channels, width = operand(site, value, self.of)
        path = edit.module("lora", lambda: beside(LowRank(channels, width, self.rank, self.alpha), edit))
        return edit.call(path, source.node, name="lora")


@dataclass(frozen=True)
class Loras(Adapting, Bank, tag="loras"):
    """y <- y + sum over experts e of g_e * alpha/rank * B_e A_e x: low-rank adapters that are weighed.

    With a gate over experts all run, as two products with stacked matrices; with a router those that are chosen. All
    have one rank; a smaller one is padded with zeros, which stay zero in training. Every B starts at 0.
    """

    rank: int = 8
    alpha: float = 16.0
    of: str = "in"

    def check(self) -> None:
        super().check()
        self.require(self.rank > 0, "rank", "a positive integer")

    def mix(self, site: Site, value: Value, edit: Editor, weights: fx.Node, indices: fx.Node | None = None) -> fx.Node:
        source, channels, width = operand(site, value, self.of)
        path = edit.module(
            "loras", lambda: beside(LowRanks(self.experts, channels, width, self.rank, self.alpha), edit)
        )
        chosen = () if indices is None else (indices,)
        return edit.call(path, source.node, weights, *chosen, name="loras")


class LowRank(nn.Module):
    """The factors a (rank, C) and b (O, rank) of one adapter. x: (..., C) -> (..., O)."""

    def __init__(self, channels: int, width: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.a = nn.Parameter(torch.empty(rank, channels))
        self.b = nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a) * (self.alpha / self.a.size(0)), self.b)


class LowRanks(nn.Module):
    """The factors a (E, rank, C) and b (E, rank, O) of E adapters, each B transposed, so that all of them are one
    matrix (E rank, O) and are multiplied by without a copy. x: (..., C), weights -> (..., O), see `weighted_sum`."""

    def __init__(self, experts: int, channels: int, width: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.a = nn.Parameter(torch.empty(experts, rank, channels))
        self.b = nn.Parameter(torch.zeros(experts, rank, width))
        for a in self.a.unbind():
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor | None = None) -> Tensor:
        return weighted_sum(x, weights * (self.alpha / self.a.size(1)), indices, self.a, self.b)
