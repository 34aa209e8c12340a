"""A convolution whose large weight is padded in the graph: ONNX Runtime would fuse the Pad as the input's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc

pytest.importorskip("onnxruntime")


class Causal(nn.Module):
    """A convolution that does not see the token itself."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.randn(32, 32, 9) / 10)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 32, N)"""
        return F.conv1d(F.pad(x, (9, 0)), F.pad(self.taps, (0, 1)))


def test_a_padded_weight_is_folded(tmp_path: Path) -> None:
    made = gatecc.export(Causal(), tmp_path, (torch.randn(2, 32, 12),))
    assert max(c.error for c in made.compared) < 1e-5
    assert made.operators["Conv"] == 1
    assert made.inputs["x"] == ["batch", 32, "x_2"]
