"""``gatecc export`` with the real export behind it: the files, what is told about them, and what a refusal leaves."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gatecc.cli import app
from gatecc.onnx import Session

pytest.importorskip("onnxruntime")
SOURCE = """
import torch
from torch import nn

class Language(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal, self.embed, self.norm = causal, nn.Embedding(32, 64), nn.LayerNorm(64)
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 32)

    def forward(self, ids):
        x = self.embed(ids)
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (2, 32)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return self.head(x + self.down(nn.functional.gelu(self.up(self.norm(x)))))

def language(causal=True):
    torch.manual_seed(0)
    return Language(causal).eval(), (torch.randint(32, (2, 12)),)

def both_ways():
    return language(causal=False)
"""


def run(*words: str, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout, result.stderr


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    file = tmp_path / "language_of_cli_test.py"
    file.write_text(SOURCE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield file
    sys.modules.pop(file.stem, None)


def test_a_decoder_in_fewer_bits_and_a_refusal(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["gatecc.export.quantize"], "_SLOWER", 1e9)  # how fast it is here is not asked
    out, words = tmp_path / "out", ("--decode", "--quantize", "w8")
    told, said = run("export", f"{file}:language", "--out", str(out), *words)
    assert told == f"{out}\n"
    names = {"model.onnx", "decode.onnx", "gatecc.json", "genai_config.json", "report.html"}
    assert {f.name for f in out.iterdir()} == names
    parts = said.split("lowered to")
    assert "ids (batch, sequence)" in parts[0]
    assert "genai_config.json; no more than 8192 tokens" in parts[0]
    assert re.search(r"w8 +0\.\d\dx the bytes", parts[0])
    lowered, _, left = parts[1].partition("not quantised")
    assert re.findall(r"[\w-]+: \w+(?= +\d)", lowered) == [
        "attention: GroupQueryAttention",
        "gelu: BiasGelu",
        "skip-norm: SkipLayerNormalization",
    ]
    assert "Gather: embedding=False" in left
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    model, (ids,) = sys.modules[file.stem].language()
    for given in ids:
        best = Session(out).generate(given[None, :5], 1)[0, -1]
        assert best == model(given[None, :5])[0, -1].argmax()
    told, said = run("export", f"{file}:both_ways", "--out", str(out), *words, code=2)
    assert not told
    assert re.search(r"(?s)GCC015.*does not prove causal", said)
    assert "Traceback" not in said
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert {f.name for f in tmp_path.iterdir()} <= {"out", file.name, "__pycache__"}


def test_a_terminated_export_leaves_nothing_behind(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def build(*args: object, **options: object) -> None:
        assert any(f.name.startswith(".gatecc-") for f in tmp_path.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            time.sleep(0.01)

    monkeypatch.setattr(sys.modules["gatecc.export"], "build", build)
    run("export", f"{file}:language", "--out", str(out), code=143)
    assert [f.name for f in tmp_path.iterdir() if f.suffix != ".py" and f.name != "__pycache__"] == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
