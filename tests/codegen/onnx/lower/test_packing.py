"""Queries, keys and values that one product stacks are pieces of it, not slices of what it is turned into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gatecc

pytest.importorskip("onnxruntime")


class Stacked(nn.Module):
    """One product as (3, B, heads, N, D), taken apart in two ways; the third has heads before pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, 16)"""
        B, N, C = x.shape
        attend = nn.functional.scaled_dot_product_attention
        q, k, v = self.qkv[0](x).reshape(B, N, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + attend(q, k, v).transpose(1, 2).reshape(B, N, C)
        qkv = self.qkv[1](x).reshape(B, N, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + attend(qkv[0], qkv[1], qkv[2], is_causal=True).transpose(1, 2).reshape(B, N, C)
        q, k, v = self.qkv[2](x).reshape(B, N, 2, 3, 8).permute(3, 0, 2, 1, 4).unbind(0)
        return x + attend(q, k, v).transpose(1, 2).reshape(B, N, C)


def test_pieces_of_one_product(tmp_path: Path) -> None:
    made = gatecc.export(Stacked(), tmp_path / "x", (torch.randn(2, 5, 16),))
    assert made.operators["com.microsoft::GroupQueryAttention"] == 1  # takes the product whole
    assert made.operators["com.microsoft::Attention"] == 1  # computes it
    assert made.operators["com.microsoft::MultiHeadAttention"] == 1
    assert "Split" not in made.operators
    assert made.operators["Slice"] == made.operators["Squeeze"] == 3  # of heads before pieces
    assert {c.sizes["batch"] for c in made.compared} == {1, 3}
