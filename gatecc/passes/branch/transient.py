"""Transient: a child network beside a value that runs while its switch is on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from gatecc.ir.edit import Editor
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.body import Adapting, Body, operand
from gatecc.passes.operands import beside


@dataclass(frozen=True)
class Transient(Adapting, Body, tag="transient"):
    """y_t <- y_t + s_t U h_t, s_t = 1[σ(w x_t + b) > 1/2]: a GRU of ``hidden`` units that runs while s_t is 1.

    Its state begins at 0 each time that the switch comes on; steps that are off are not computed. The switch learns
    straight through, where it is on. ``of`` is the stage that it reads, x: ``in`` beside the site, ``self`` behind the
    value. U starts at 0. ``open`` is b before training.
    """

    hidden: int = 64
    of: str = "in"
    open: float = 0.0

    def check(self) -> None:
        self.require(self.hidden > 0, "hidden", "a positive integer")

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        source, channels, width = operand(site, value, self.of)
        path = edit.module("child", lambda: beside(Child(self, channels, width), edit))
        return edit.call(path, source.node, name="child")


class Child(nn.Module):
    """The module of `Transient`."""

    def __init__(self, spec: Transient, channels: int, width: int) -> None:
        super().__init__()
        self.switch = nn.Linear(channels, 1)
        nn.init.constant_(self.switch.bias, spec.open)
        made = nn.GRU(channels, spec.hidden)
        self.w_in, self.w_state = made.weight_ih_l0, made.weight_hh_l0
        self.b_in, self.b_state = made.bias_ih_l0, made.bias_hh_l0
        self.out = nn.Linear(spec.hidden, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, width)"""
        p = torch.sigmoid(self.switch(x))
        on = p > 0.5
        h, _ = torch.ops.gatecc.transient(x, on.squeeze(-1), self.w_in, self.w_state, self.b_in, self.b_state, None)
        learns = torch.where(on, p, torch.ones_like(p))
        return self.out(h) * (learns / learns.detach())
