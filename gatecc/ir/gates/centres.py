"""Centres: clusters of samples as a scorer, and the confidence of a classifier as a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from gatecc.ir.gates.layout import Features, GateShape, SourceShape, align, channels_last
from gatecc.ir.gates.scorer import Params, Scorer, Shapes
from gatecc.ir.gates.source import Ref, Source


@dataclass(frozen=True)
class Centres(Scorer, tag="centres"):
    """The cosine of x and each centre, divided by T. Centres are the rows of ``weight``; they have no gradient."""

    trained: ClassVar[bool] = False
    T: float = 0.1

    def check(self) -> None:
        self.require(self.T > 0, "T", "a positive number")

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        return {"weight": (features, channels)}

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        return Features(F.linear(F.normalize(x.x, dim=-1), F.normalize(params["weight"], dim=-1)) / self.T, x.at)


@dataclass(frozen=True)
class Confidence(Source, tag="confidence"):
    """The largest entry of a value's channels, of probabilities how sure a classifier is; without gradient."""

    of: str

    @property
    def refs(self) -> tuple[Ref, ...]:
        return (Ref(stage=self.of),)

    def channels(self, shapes: Sequence[SourceShape]) -> int:
        return 1

    def read(self, shape: GateShape, shapes: Sequence[SourceShape], value: Tensor, xs: Sequence[Tensor]) -> Features:
        x, at = align(channels_last(xs[0].detach(), shapes[0].axes, shape.sizes), shape, value)
        return Features(x.amax(-1, keepdim=True), at)
