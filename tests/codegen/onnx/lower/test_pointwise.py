"""Norms, GELU and SiLU in every spelling are one node each; export itself compares them with torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc

pytest.importorskip("onnxruntime")


class Norms(nn.Module):
    """RMS norms of x: (B, N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> list[Tensor]:
        w, wide = self.weight, x.float()
        mean = wide.pow(2).mean(-1, keepdim=True)
        return [
            w * (wide * torch.rsqrt(mean + 1e-6)).to(x.dtype),  # Llama
            (wide * torch.rsqrt(mean + 1e-5)) * (1.0 + w.float()),  # Gemma
            x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w,
            x * (x.square().mean(2, keepdim=True) + 1e-6) ** -0.5 * w,
            F.rms_norm(x, (8,), w, 1e-6),
            F.rms_norm(x, (8,), w),
        ]


class Others(nn.Module):
    """What is nearly one, and must stay."""

    def forward(self, x: Tensor) -> list[Tensor]:
        w = x[0, 0]
        return [
            x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * torch.ones(8),  # another axis
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,  # no weight
            x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) * torch.ones(8),  # no mean
            x * torch.sigmoid(-1.5 * x),  # a negative slope
            0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),  # another number
        ]


def test_every_spelling_of_a_norm(tmp_path: Path) -> None:
    made = gatecc.export(Norms(), tmp_path / "x", (torch.randn(2, 3, 8),))
    assert made.lowered == {"rms-norm: RMSNormalization": 6}
    assert set(made.operators) <= {"RMSNormalization", "Identity"}  # equal ones are one, 1 + weight is a constant


def test_what_is_nearly_one_stays(tmp_path: Path) -> None:
    made = gatecc.export(Others(), tmp_path / "x", (torch.randn(2, 3, 8),))
    assert not {"RMSNormalization", "com.microsoft::QuickGelu", "com.microsoft::FastGelu"} & set(made.operators)
    assert made.lowered == {}


class Activations(nn.Module):
    """GELU and SiLU of (B, N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        cubic = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return [
            F.gelu(x),
            x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
            F.gelu(x, approximate="tanh"),
            0.5 * x * (1 + torch.tanh(cubic)),
            F.gelu(self.up[0](x)),
            F.gelu(self.up[1](x), approximate="tanh"),
            F.silu(x),
            x * torch.sigmoid(1.702 * x),
        ]


def test_every_spelling_of_an_activation(tmp_path: Path) -> None:
    made = gatecc.export(Activations(), tmp_path / "x", (torch.randn(2, 3, 8),))
    assert made.lowered == {"gelu: BiasGelu": 1, "gelu: FastGelu": 3, "gelu: Gelu": 2, "silu: QuickGelu": 2}
    assert not {"Erf", "Tanh", "Sigmoid", "Add"} & set(made.operators)


class Blocks(nn.Module):
    """Two residual joins with norms, the second of a branch with a bias; the sums are read again."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6)
        self.mix, self.up = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.mix(other)
        y = self.one(x)
        x = x + self.up(y)
        return x, self.two(x)


def test_a_norm_takes_the_residual_and_the_bias(tmp_path: Path) -> None:
    made = gatecc.export(Blocks(), tmp_path / "x", (torch.randn(2, 3, 8), torch.randn(2, 3, 8)))
    assert made.operators == {
        "MatMul": 2,
        "com.microsoft::SkipLayerNormalization": 1,
        "com.microsoft::SkipSimplifiedLayerNormalization": 1,
    }
