"""What FP4 weights would do is told, and no file is another one."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.codegen.onnx.fp4 import columns
from gatecc.errors import ArgumentError
from gatecc.export.quantize import Quantize

pytest.importorskip("onnxruntime")


class Chosen(nn.Module):
    """Two of 8 vectors for each token, behind a layer: (B, N, 16) -> (B, N, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.head = nn.Linear(16, 32), nn.Linear(32, 8, bias=False), nn.Linear(32, 12)
        self.vectors = nn.Parameter(torch.randn(8, 32))

    def routes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.first(x).relu()
        return h, *self.router(h).sigmoid().topk(2, -1)

    def forward(self, x: Tensor) -> Tensor:
        h, scores, indices = self.routes(x)
        return self.head(h + (scores[..., None] * self.vectors[indices]).sum(-2))


def test_the_analysis_changes_no_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, samples = Chosen().eval(), [(torch.randn(3, n, 16),) for n in (4, 40)]
    plain = gatecc.export(model, tmp_path / "plain", (torch.randn(2, 5, 16),))
    made = gatecc.export(model, tmp_path / "x", (torch.randn(2, 5, 16),), quantize="fp4", evaluation_inputs=samples)
    assert made.files == plain.files
    assert made.operators == plain.operators
    assert {p.name for p in (tmp_path / "x").iterdir()} == {p.name for p in (tmp_path / "plain").iterdir()}
    assert any("fp4" in note for note in made.notes)
    told = made.quantized
    assert told is not None
    assert told.quantized == {"MatMul": 2}
    assert told.kept == {"MatMul: something is chosen by it": 1}
    narrow = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (narrow.first, narrow.head):
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(columns(layer.weight.detach().numpy().T).T)))
        pairs = [(model(x), narrow(x)) for (x,) in samples]
        choices = [(model.routes(x)[2], narrow.routes(x)[2]) for (x,) in samples]
    worst = max(float((a - b).abs().max() / a.abs().max().clamp(min=1)) for a, b in pairs)
    (accuracy,) = told.accuracy
    assert accuracy.error == pytest.approx(worst, rel=1e-3)
    same = [
        len(set(a) & set(b))
        for x, y in choices
        for a, b in zip(*(z.flatten(0, 1).tolist() for z in (x, y)), strict=True)
    ]
    (share,) = told.routes.values()
    assert share == pytest.approx(sum(same) / (2 * len(same)))
    assert 0.5 < share < 1


def test_options_that_it_has_not() -> None:
    with pytest.raises(ArgumentError, match="none of the analysis"):
        Quantize("fp4", block=32)
