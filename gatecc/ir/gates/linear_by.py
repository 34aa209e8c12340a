"""LinearBy: a linear scorer of its own for each value of an integer input: a router per task."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from gatecc.ir.gates.layout import Features
from gatecc.ir.gates.scorer import Params, Scorer, Shapes
from gatecc.ir.gates.source import Cond, Source


@dataclass(frozen=True)
class LinearBy(Scorer, tag="linear_by"):
    """W_i x, where the integer i (one of n) is the last part of the source: ``("in", "cond(task)")`` (M³ViT).

    The rows of the other values take no part: what one task learns leaves the routers of the others as they are.
    """

    n: int

    def check(self) -> None:
        self.require(self.n > 0, "n", "a positive integer")

    def accepts(self, source: Source) -> str:
        last = source.parts[-1]
        fits = len(source.parts) > 1 and isinstance(last, Cond)
        return "" if fits else "what is scored, then an integer input: in+cond(NAME)"

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        return {"weight": (self.n, features, channels - 1)}

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        index = x.x[..., -1].round().long()[..., None, None].expand(*[-1] * len(x.at), 1, features)
        each = F.linear(x.x[..., :-1], params["weight"].flatten(0, 1)).unflatten(-1, (self.n, features))
        return Features(each.gather(-2, index).squeeze(-2), x.at)
