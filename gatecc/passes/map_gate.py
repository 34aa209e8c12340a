"""MapGate: convolutions that are off where a map of classes says background; the maps are outputs on the side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Site
from gatecc.ir.sizes import described_shape
from gatecc.passes.operands import beside, place, stage, static_sizes

_NEARLY = 1e-3  # the largest share of background of which the start is still called the original


class ClassMaps(nn.Module):
    """A = softmax over classes of a 1 x 1 convolution; class 0 is the background.

    With ``background`` its share at first is that everywhere, without the convolution is random.
    """

    def __init__(self, channels: int, classes: int, background: float) -> None:
        super().__init__()
        self.score = nn.Conv2d(channels, classes, 1)
        if background:
            nn.init.zeros_(self.score.weight)
            odds = torch.zeros(classes)
            odds[0] = log(background * (classes - 1) / (1 - background))
            self.score.bias = nn.Parameter(odds)

    def forward(self, f: Tensor) -> Tensor:
        """f: (B, C, H, W) -> (B, classes, H, W), which sum to 1"""
        return torch.softmax(self.score(f), 1)


def foreground(y: Tensor, maps: Tensor) -> Tensor:
    """y <- y Σ_(c >= 1) A_c. y: (B, C, H', W'), maps: (B, classes, H, W), brought to the size of y by its nearest"""
    a = maps[:, 1:].sum(1, keepdim=True)
    if a.shape[2:] != y.shape[2:]:
        a = F.interpolate(a, size=y.shape[2:], mode="nearest")
    return y * a


@dataclass(frozen=True)
class MapGate(Rewrite):
    """Multiply a convolution's output by what a map of ``classes`` says of each pixel: 1 less the background's share.

    The map is softmax(conv1x1(f)) over the classes, f the convolution's input. `gatecc.train.class_maps` reads the maps
    of a call, at all scales. ``background``: its share at first, everywhere (0: the maps start at random); near 0 the
    model starts nearly as it was.
    """

    name = "map_gate"

    classes: int = 2
    background: float = 0.0
    label: str = "maps"

    def __post_init__(self) -> None:
        if self.classes < 2 or not 0 <= self.background < 1:
            raise ArgumentError(
                "a map tells a background from something",
                found=f"classes={self.classes}, background={self.background}",
                expected="classes >= 2, a share in [0, 1)",
            )
        if self.site.kind != "conv":
            raise ArgumentError("maps gate convolutions", found=str(self.site), expected="conv[...]")

    def contract(self) -> Contract:
        return identity_at_init(self.background) if 0 < self.background <= _NEARLY else changes_function()

    def effects(self) -> Effects:
        return Effects(same_for_layers=True)

    def reads(self) -> Iterable[str]:
        return ("in", "out")

    def rewrite(self, site: Site, edit: Editor) -> None:
        f, y = stage(site, "in"), stage(site, "out")
        channels = static_sizes(f).get("c")
        if f.axes.text != "bcyx" or y.axes.text != "bcyx" or channels is None:
            raise SiteRefusedError(
                "maps are of pixels",
                where=place(site),
                found=f"axes {f.axes} of ({described_shape(f.node)})",
                expected="a convolution over rows and columns, (b, c, y, x)",
                do='select others: sites="conv[decoder.*]"',
            )
        path = edit.module(self.label, lambda: beside(ClassMaps(channels, self.classes, self.background), edit))
        maps = edit.call(path, f.node, name=self.label)
        edit.replace(y.node, edit.call(foreground, y.node, maps, name="foreground"))
