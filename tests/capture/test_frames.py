"""Frames: the lines of nodes are torch's, and torch has its own traces back afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import proxy
from torch.utils._traceback import CapturedTraceback

from gatecc.capture import capture
from gatecc.capture.frames import Frames
from gatecc.errors import CaptureError
from gatecc.ir.program import origin
from tests.recipes.tiny import tiny


def lines() -> list[str]:
    graph = capture(tiny(causal=True, fused=False), (torch.randn(2, 5, 16),)).graph
    return [origin(node).line for node in graph.nodes]


def test_lines_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines()
    assert sum(line.startswith("tiny.py:") for line in found) > 50
    monkeypatch.setattr(Frames, "extract", CapturedTraceback.extract)
    assert lines() == found


def test_torch_has_its_own_back() -> None:
    class Undecided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool(x.sum() > 0) else -x

    with pytest.raises(CaptureError, match=r"test_frames\.py"):
        capture(Undecided(), (torch.randn(2, 3),))
    assert vars(proxy)["CapturedTraceback"] is CapturedTraceback
