"""Hashing: scores from a hash of token ids or of quantised values, fixed or through learned tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.layout import Features
from gatecc.ir.gates.scorer import Params, Scorer, Shapes

_PRIME = 2_147_483_647  # products of two remainders fit into 63 bits
_SPREAD = 2_654_435_761
_MOST = 4  # a grid cell has 2^channels corners


@dataclass(frozen=True)
class Hash(Scorer, tag="hash"):
    """A fixed expert for each value: score 0 at its hash, -1, -2, ... for the features after it, in a circle.

    Integers (token ids) are hashed as they are; floats in cells of width ``cell``. Nothing is learned. With
    choice=softmax_topk(1) each token has one expert, of weight 1 (Hash Layers, 2021).
    """

    constant: ClassVar[str] = ""
    trained: ClassVar[bool] = False
    reads_integers: ClassVar[bool] = True
    cell: float = 1.0
    seed: int = 0

    def check(self) -> None:
        self.require(self.cell > 0, "cell", "a positive number")
        self.require(self.seed >= 0, "seed", "an integer >= 0")

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        return {}

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        cells = torch.floor(x.x.float() / self.cell) if x.x.is_floating_point() else x.x
        at = hashed(cells.long(), features, self.seed).unsqueeze(-1)
        distance = torch.remainder(torch.arange(features, device=at.device) - at, features)
        return Features(-distance.float(), x.at)


@dataclass(frozen=True)
class HashGrid(Scorer, tag="hash_grid"):
    """W h(x) + b for points x of at most 4 channels, h being a multi-resolution hash encoding (Instant-NGP, 2022).

    Level l has cells of width 1 / (resolution · growth^l). The corners of a cell hash into a table of ``size`` rows of
    ``features`` learned numbers, which are interpolated; Switch-NeRF++ chooses experts by it.
    """

    levels: int = 4
    size: int = 1024
    features: int = 2
    resolution: float = 4.0
    growth: float = 2.0

    def check(self) -> None:
        for name in ("levels", "size", "features", "resolution", "growth"):
            self.require(getattr(self, name) > 0, name, "a positive number")

    def shapes(self, channels: int, features: int, at: str) -> Shapes:
        if channels > _MOST:
            raise ArgumentError(
                "a hash grid is for points", found=f"{channels} channels", expected=f"at most {_MOST}, of a source"
            )
        return {
            "table": (self.levels * self.size, self.features),
            "weight": (features, self.levels * self.features),
            "bias": (features,),
        }

    def __call__(self, x: Features, params: Params, features: int) -> Features:
        table, device, channels = params["table"], x.x.device, x.x.size(-1)
        level = torch.arange(self.levels, device=device).unsqueeze(-1)
        place = x.x.float().unsqueeze(-2) * (self.resolution * torch.pow(self.growth, level.float()))  # (*at, L, C)
        cell = torch.floor(place)
        bits = torch.full((channels,), 2, device=device).cumprod(0) // 2
        corners = torch.arange(2**channels, device=device).unsqueeze(-1) // bits % 2  # (2^C, C) of 0 and 1
        rows = hashed(cell.long().unsqueeze(-2) + corners, self.size, level) + level * self.size
        part = (place - cell).to(table.dtype).unsqueeze(-2)
        share = torch.where(corners == 1, part, 1 - part).prod(-1, keepdim=True)
        h = (share * F.embedding(rows, table)).sum(-2).flatten(-2)
        return Features(F.linear(h, params["weight"], params["bias"]), x.at)


def hashed(x: Tensor, size: int, seed: int | Tensor) -> Tensor:
    """x: (*at, C) of integers -> (*at), numbers below ``size``: the same everywhere, in ONNX too."""
    start = seed.unsqueeze(-1) * _MOST if isinstance(seed, Tensor) else seed * _MOST
    number = torch.arange(x.size(-1), device=x.device) + 1 + start
    factor = torch.remainder(number * _SPREAD, _PRIME)
    factor = torch.remainder(factor * factor, _PRIME)
    mixed = torch.remainder(torch.remainder(torch.remainder(x, _PRIME) * factor, _PRIME).sum(-1), _PRIME)
    mixed = torch.remainder(mixed * _SPREAD + seed, _PRIME)  # neighbours apart
    return torch.remainder(mixed // 7919, size)
