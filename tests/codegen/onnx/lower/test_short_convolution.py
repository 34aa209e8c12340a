"""Convolutions that look back, each channel by itself, are one node; what looks elsewhere stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gatecc
from tests.decoder.mixing import Convolution, D

pytest.importorskip("onnxruntime")


class Convolutions(nn.Module):
    """Padded and cut, padded on the left; then dilated, mixing channels, and seeing the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.ModuleList([Convolution(cut=True), Convolution(cut=False)])
        self.dilated = Convolution(cut=True, dilation=2)
        self.mixing, self.centred = nn.Conv1d(D, D, 3, padding=2), nn.Conv1d(D, D, 3, padding=1, groups=D)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        for convolution in (*self.short, self.dilated):
            x = convolution(x)
        x = x.transpose(1, 2)
        return self.centred(self.mixing(x)[..., : x.shape[-1]])


def test_what_looks_back_is_one_node(tmp_path: Path) -> None:
    made = gatecc.export(Convolutions().eval(), tmp_path / "x", (torch.randn(2, 9, D),), target="opset27")
    assert made.lowered == {"short-convolution: CausalConvWithState with SiLU": 2}
    assert (made.operators["CausalConvWithState"], made.operators["Conv"], made.opset) == (2, 3, 27)
    assert {c.sizes["sequence"] for c in made.compared} > {1, 7, 131}
