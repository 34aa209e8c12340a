"""Penalty: one channel of a value, subtracted from the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.body import Body, operand
from gatecc.passes.operands import beside


@dataclass(frozen=True)
class Penalty(Body, tag="penalty"):
    """y_k <- y_k - p_k * y_channel: what all objectives share with one of them is taken out.

    p is a buffer, ``penalty``, which starts at 0 and is not trained.
    """

    channel: int

    def check(self) -> None:
        self.require(self.channel >= 0, "channel", "the number of a channel")

    @property
    def effects(self) -> Effects:
        return Effects(same_for_layers=True)

    @property
    def starts_at_zero(self) -> bool:
        return True

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        _, _, width = operand(site, value, "self")
        self.require(self.channel < width, "channel", f"less than {width}")
        path = edit.module("penalties", lambda: beside(Penalties(self.channel, width), edit))
        return edit.call(path, value.node, name="penalty")


class Penalties(nn.Module):
    """The module of `Penalty`. x: (..., K) -> (..., K)."""

    penalty: Tensor

    def __init__(self, channel: int, width: int) -> None:
        super().__init__()
        self.channel = channel
        self.register_buffer("penalty", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return -self.penalty * x.narrow(-1, self.channel, 1)
