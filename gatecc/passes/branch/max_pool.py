"""MaxPool: the largest value around each place of a map of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.site import Site, Value
from gatecc.ir.sizes import described_shape
from gatecc.passes.branch.body import Body
from gatecc.passes.operands import place


@dataclass(frozen=True)
class MaxPool(Body, tag="max_pool"):
    """max over a ``kernel`` by ``kernel`` window of s(y), y a map (B, C, H, W), which keeps its size.

    s is a ReLU, a neuron inside a loop: the largest of spikes is a spike again, 0 or 1, where their mean is not.
    """

    kernel: int = 3

    def check(self) -> None:
        self.require(self.kernel > 0 and self.kernel % 2 == 1, "kernel", "an odd number, so that a window has a centre")

    @property
    def effects(self) -> Effects:
        return Effects(same_for_layers=True)

    @property
    def ops(self) -> tuple[str, ...]:
        return ("add", "lerp")

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        if value.axes != "bcyx":
            raise SiteRefusedError(
                "only a map of features has places to take the largest value of",
                where=place(site),
                found=f"axes {value.axes} of ({described_shape(value.node)})",
                expected="(b, c, y, x)",
                do='select a patch embedding or a convolution: sites="embedding[...].out"',
            )
        return edit.call(largest, value.node, self.kernel, name="largest")


def largest(y: Tensor, kernel: int) -> Tensor:
    """(B, C, H, W) -> the same shape"""
    return F.max_pool2d(F.relu(y), kernel, 1, kernel // 2)
