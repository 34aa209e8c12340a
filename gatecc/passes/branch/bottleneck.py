"""Bottleneck adapters: one, or a bank of several that are weighed for each position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc.ir.edit import Editor
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.body import Adapting, Bank, Body, operand
from gatecc.passes.branch.weighted import ACTIVATIONS, weighted_sum
from gatecc.passes.operands import beside

Pointwise = Literal["silu", "gelu", "relu", "tanh", "identity"]


@dataclass(frozen=True)
class Bottleneck(Adapting, Body, tag="bottleneck"):
    """y <- y + U (act(G x) * D x), or U act(D x) where it is not ``gated`` (Houlsby et al., 2019). U starts at 0.

    ``width`` is that of the bottleneck. ``of`` is the stage that it reads, x: ``self`` puts it behind the value,
    ``in`` beside the site. With ``start="random"`` U starts as D does: two layers that take the value's place.
    """

    width: int = 64
    gated: bool = False
    activation: Pointwise = "gelu"
    of: str = "self"
    start: Literal["zero", "random"] = "zero"

    def check(self) -> None:
        self.require(self.width > 0, "width", "a positive integer")

    @property
    def starts_at_zero(self) -> bool:
        return self.start == "zero"

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        source, channels, width = operand(site, value, self.of)
        path = edit.module("adapter", lambda: beside(Adapter(self, channels, width), edit))
        return edit.call(path, source.node, name="adapter")


@dataclass(frozen=True)
class Bottlenecks(Adapting, Bank, tag="bottlenecks"):
    """y <- y + sum over experts e of g_e * U_e (act(G_e x) * D_e x): bottleneck adapters that are weighed.

    The options are those of ``bottleneck``. Every U starts at 0.
    """

    width: int = 64
    gated: bool = False
    activation: Pointwise = "gelu"
    of: str = "self"

    def check(self) -> None:
        super().check()
        self.require(self.width > 0, "width", "a positive integer")

    def mix(self, site: Site, value: Value, edit: Editor, weights: fx.Node, indices: fx.Node | None = None) -> fx.Node:
        source, channels, width = operand(site, value, self.of)
        path = edit.module("adapters", lambda: beside(Adapters(self, channels, width), edit))
        chosen = () if indices is None else (indices,)
        return edit.call(path, source.node, weights, *chosen, name="adapters")


class Adapter(nn.Module):
    """The module of `Bottleneck`: down (F or 2F, C), the rows of G before those of D, and up (O, F).

    x: (..., C) -> (..., O).
    """

    def __init__(self, spec: Bottleneck, channels: int, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.down = nn.Parameter(torch.empty((1 + spec.gated) * spec.width, channels))
        self.up = nn.Parameter(torch.zeros(width, spec.width))
        nn.init.uniform_(self.down, -(channels**-0.5), channels**-0.5)
        if spec.start == "random":
            nn.init.uniform_(self.up, -(spec.width**-0.5), spec.width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.down)
        act = ACTIVATIONS[self.spec.activation]
        if not self.spec.gated:
            return F.linear(act(h), self.up)
        gate, h = h.chunk(2, -1)
        return F.linear(act(gate) * h, self.up)


class Adapters(nn.Module):
    """The module of `Bottlenecks`: down (E, F or 2F, C) and up (E, F, O), see `LowRanks`."""

    def __init__(self, spec: Bottlenecks, channels: int, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.down = nn.Parameter(torch.empty(spec.experts, (1 + spec.gated) * spec.width, channels))
        self.up = nn.Parameter(torch.zeros(spec.experts, spec.width, width))
        nn.init.uniform_(self.down, -(channels**-0.5), channels**-0.5)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor | None = None) -> Tensor:
        return weighted_sum(x, weights, indices, self.down, self.up, self.spec.activation, self.spec.gated)
