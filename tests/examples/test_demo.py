from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import gatecc
from examples import demo, sentences
from examples.docstrings import pairs

SOURCE = """
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(y.transpose(1, 2).flatten(2))

def attention():
    return nn.Sequential(Layer(), Layer()), (torch.randn(2, 5, 8),)

def plain():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), (torch.randn(3, 8),)
"""

app = typer.Typer()
app.command()(demo.main)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo takes every core: here another process of tests runs on them, and threads that wait for one cost most of
    the time."""
    monkeypatch.setattr("examples.demo.os.cpu_count", lambda: 1)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    file = tmp_path / "models_of_the_demo_test.py"
    file.write_text(SOURCE)
    return file


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.mark.timeout(900)  # minutes where other work takes the cores
def test_the_encoder_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in (("HELD_OUT", 32), ("BATCH", 8), ("TOKENS", 16)):
        monkeypatch.setattr(sentences, name, small)
    text = run("--seconds", "2", "--out", str(tmp_path / "out"))
    assert "6 attention" in text
    assert "every promise held" in text
    assert "loaded into a fresh model (3 batches): bitwise equal" in text
    losses = re.search(r"held-out loss (\d\.\d+) → (\d\.\d+)", text)
    assert losses is not None
    assert losses[1] != losses[2]
    assert len(re.findall(r"[+-]\d\.\d{3}\s+[+-]\d\.\d{3}", text)) == 5
    written = {f.relative_to(tmp_path / "out").as_posix() for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert {"report.html", "checkpoint/recipe.json", "checkpoint/model.safetensors", "onnx/model.onnx"} <= written


@pytest.mark.parametrize(("factory", "gates"), [("attention", "gated-attention"), ("plain", "gates on linear sites")])
def test_a_model_of_ones_own(models: Path, tmp_path: Path, factory: str, gates: str) -> None:
    text = run("--model", f"{models}:{factory}", "--seconds", "1", "--out", str(tmp_path / "out"))
    assert gates in text
    assert "every promise held" in text
    assert "skipped: similarities" in text
    found = re.search(r"distance from the original (\S+) → (\S+)", text)
    assert found is not None
    assert float(found[2]) < float(found[1])


def test_a_broken_promise_is_an_exit_code(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        return gatecc.transform(model, "gated-attention", (torch.randn(2, 5, 8),))

    monkeypatch.setattr(gatecc, "load", forgetful)
    text = run("--model", f"{models}:attention", "--seconds", "0.5", "--out", str(tmp_path / "out"), code=1)
    assert "broken" in text
    assert "loaded into a fresh model" in text


def test_an_error_is_shown_without_a_traceback(tmp_path: Path) -> None:
    assert "GCC009" in run("--model", "nowhere:model", "--out", str(tmp_path / "out"), code=2)


def test_pairs_are_texts_that_differ() -> None:
    found = pairs(60)
    assert len({text for pair in found for text in pair}) == 120
    assert found == pairs(60)
