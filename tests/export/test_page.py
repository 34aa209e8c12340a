"""report.html says what an export did, and nothing of where and when."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from torch import nn

import gatecc
from tests.test_export import X

pytest.importorskip("onnxruntime")


def test_the_report_says_what_was_done_in_the_same_bytes_each_time(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    one, two = (gatecc.export(model, tmp_path / name, (X,)) for name in ("one", "two"))
    for name in ("gatecc.json", "model.onnx", "report.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    page = (tmp_path / "one" / "report.html").read_text()
    assert one.minimal_runtime == two.minimal_runtime == version("onnxruntime")
    worst = max(c.error for c in one.compared)
    for text in (*one.lowered, *one.files.values(), f"{worst:.1e}", *one.operators, version("onnxruntime")):
        assert text in page
    assert str(tmp_path) not in page
