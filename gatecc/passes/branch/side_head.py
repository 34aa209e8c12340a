"""SideHead: a projection of an earlier value of the model, added to a later one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.select import Selector, select
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.body import Body
from gatecc.passes.operands import beside, place, stage, static_sizes


@dataclass(frozen=True)
class SideHead(Body, tag="side_head"):
    """y <- y + W LN(h), h the value that the selector ``at`` names: ``side_head("block[2].out")``. W starts at 0.

    Beside the head of a model, it is a second head on an earlier layer.
    """

    at: str
    norm: bool = True

    def check(self) -> None:
        Selector.parse(self.at)

    @property
    def effects(self) -> Effects:
        return Effects(whole_model=True, same_for_layers=True)

    @property
    def starts_at_zero(self) -> bool:
        return True

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        wanted = Selector.parse(self.at)
        found = select(wanted, edit.sites)
        source = stage(found[0], wanted.stage)
        channels, width = static_sizes(source).get("c"), static_sizes(value).get("c")
        fits = source.axes == value.axes and value.axes.text.endswith("c")
        if len(found) != 1 or not fits or channels is None or width is None:
            raise SiteRefusedError(
                "a side head reads one value at the positions of the value that it is added to",
                where=place(site),
                found=f"{len(found)} values with the axes {source.axes}, a value with {value.axes}",
                expected="one, with the same axes and the channels last",
                do="select another value: SideHead('block[0].out')",
            )
        path = edit.module("side_head", lambda: beside(Projection(channels, width, self.norm), edit))
        return edit.call(path, source.node, name="side_head")


class Projection(nn.Module):
    """The module of `SideHead`. x: (..., C) -> (..., O)."""

    def __init__(self, channels: int, width: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels) if norm else nn.Identity()
        self.out = nn.Linear(channels, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))
