"""GATECC_DEBUG: what is written of a compilation, and a repro script that runs alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gatecc.backend import debugging
from tests.backend.test_backend import Masked, inputs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GATECC_DEBUG", str(tmp_path / "debug"))
    return tmp_path / "debug"


def of(folder: Path) -> Path:
    (found,) = folder.glob("*-compile")
    return found


def test_what_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debugging, "KERNEL_SOURCES", [lambda graph: {"kernel.c": f"// {len(graph.graph.nodes)}"}])
    torch.compile(Masked(), backend="gatecc", mode="eager")(inputs())
    made = of(folder)
    assert "scaled_dot_product_attention" in (made / "given.py").read_text()
    assert "arange" in (made / "given.py").read_text()
    assert "arange" not in (made / "lowered.py").read_text()
    assert "became  is_causal=True" in (made / "outcomes.txt").read_text()
    assert "lower causal-mask" in (made / "times.txt").read_text()
    assert "the compiler behind" in (made / "times.txt").read_text()
    assert (made / "kernels" / "kernel.c").read_text().startswith("// ")
    assert len(list(folder.glob("*-model-lower.txt"))) >= 1


def test_the_repro_script_runs_alone(folder: Path) -> None:
    torch.compile(Masked(), backend="gatecc", mode="eager", dynamic=True)(inputs())
    own = {k: v for k, v in os.environ.items() if k != "GATECC_DEBUG"}
    words = [sys.executable, str(of(folder) / "repro.py"), "gatecc", "eager"]
    done = subprocess.run(words, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-5


def test_what_cannot_be_written_stops_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file in the place of the folder")
    monkeypatch.setattr("gatecc.pipeline.debug.show", lambda *_: None)
    model = nn.Linear(8, 8)
    assert torch.equal(torch.compile(model, backend="gatecc", mode="eager")(inputs()), model(inputs()))
    assert "repro.py was not written" in caplog.text


def test_nothing_is_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GATECC_DEBUG", "0")
    torch.compile(nn.Linear(8, 8), backend="gatecc", mode="eager")(inputs())
    assert not list(tmp_path.iterdir())
