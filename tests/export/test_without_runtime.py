"""Where ONNX Runtime is missing, ONNX's reference evaluator compares a small size."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gatecc
from gatecc.codegen.onnx import worker
from gatecc.errors import ExportError, MissingPackageError
from tests.test_export import Conv, X


def test_without_onnx_runtime_the_reference_evaluator_computes_a_small_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    made = gatecc.export(Conv().eval(), tmp_path / "x", (torch.randn(2, 3, 8, 8),))
    assert [c.sizes["batch"] for c in made.compared] == [3]
    assert made.compared[0].error < 1e-5
    assert "reference evaluator" in made.notes[-1]
    assert made.minimal_runtime is None
    monkeypatch.setattr(worker.Reference, "run", lambda self, names, feeds: [np.zeros((3, 4, 4, 4), "f")] * 2)
    with pytest.raises(ExportError, match="does not compute what the model does"):
        gatecc.export(Conv().eval(), tmp_path / "wrong", (torch.randn(2, 3, 8, 8),))
    gelu = nn.Sequential(nn.Linear(4, 8), nn.GELU())
    with pytest.raises(MissingPackageError, match=r"(?s)com\.microsoft.*target='portable'"):
        gatecc.export(gelu, tmp_path / "contrib", (X,))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_a_runtime_that_does_not_load_opset_27_is_replaced_by_the_reference_evaluator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime 1.26 and before answer, and any that lacks the kernel of an operator."""

    def load(self: object, path: str, settings: object, values: object = ()) -> None:
        raise worker.RaisedThereError("Fail", "Opset 27 is under development and support for this is limited")

    class Mix(nn.Module):
        def forward(self, q: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
            return torch.ops.gatecc.linear_attention(q, q, q, -g.abs())[0]

    monkeypatch.setattr(worker.Apart, "load", load)
    monkeypatch.setattr(worker.Worker, "load", load)
    inputs = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    made = gatecc.export(Mix().eval(), tmp_path / "x", inputs, target="opset27")
    assert made.operators["LinearAttention"] == 1
    assert [c.reference for c in made.compared] == [True]
    assert made.compared[0].error < 1e-5
    assert made.minimal_runtime is None
    assert "does not load opset 27 (Fail: Opset 27 is under development" in made.notes[-1]
    with pytest.raises(ExportError, match="does not load the graph"):
        gatecc.export(Conv().eval(), tmp_path / "y", (torch.randn(2, 3, 8, 8),))
