"""Feature maps: phi(q) and phi(k) of linear attention, in place of the exponential of their product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.ir.gates.option import Option


@dataclass(frozen=True)
class FeatureMap(Option, slot="feature map"):
    """Base of feature maps."""

    def width(self, key: int) -> int:
        """The number of features of a head of ``key`` channels."""
        return key

    def module(self, heads: int, key: int) -> nn.Module:
        """x: (B, H, N, D) -> (B, H, N, F)."""
        return _Pointwise(self)

    def __call__(self, x: Tensor) -> Tensor:
        """The map itself, where it has no parameters."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(FeatureMap, tag="none"):
    """x"""

    def __call__(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class SoftmaxMap(FeatureMap, tag="softmax"):
    """softmax over the channels of a head, in float32 (Liger)."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.softmax(-1, dtype=torch.float32)


@dataclass(frozen=True)
class ReluMap(FeatureMap, tag="relu"):
    """relu(x) + eps (LINA)."""

    eps: float = 1e-6

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x) + self.eps


@dataclass(frozen=True)
class EluMap(FeatureMap, tag="elu"):
    """elu(x) + 1 (Katharopoulos et al. 2020)."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


@dataclass(frozen=True)
class UnitMap(FeatureMap, tag="unit"):
    """x / |x|, which the delta rules need to be stable (DeltaNet); ``smooth``: x / sqrt(|x|² + 1e-6), in float32
    (flash-linear-attention, Qwen3-Next)."""

    silu: bool = False
    smooth: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        x = F.silu(x) if self.silu else x
        if not self.smooth:
            return F.normalize(x, dim=-1, eps=1e-6)
        wide = x.float() if x.dtype != torch.float64 else x
        return wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) + 1e-6)


@dataclass(frozen=True)
class Hedgehog(FeatureMap, tag="hedgehog"):
    """softmax over [x W, -x W] with a matrix W a head, the identity at first (Zhang et al. 2024; LoLCATs 2024).

    ``temperature`` multiplies x W: 2 as in flash-linear-attention. Features are at least ``floor``, so that their sums
    can be divided by.
    """

    temperature: float = 2.0
    floor: float = 1e-12

    def width(self, key: int) -> int:
        return 2 * key

    def module(self, heads: int, key: int) -> nn.Module:
        return _Hedgehog(self, heads, key)


class _Pointwise(nn.Module):
    def __init__(self, map: FeatureMap) -> None:
        super().__init__()
        self.map = map

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


class _Hedgehog(nn.Module):
    def __init__(self, map: Hedgehog, heads: int, key: int) -> None:
        super().__init__()
        self.map = map
        self.weight = nn.Parameter(torch.eye(key).repeat(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, N, D) -> (B, H, N, 2 D)."""
        y = (x @ self.weight) * self.map.temperature
        return torch.cat([y, -y], -1).softmax(-1, dtype=torch.float32).clamp_min(self.map.floor)
