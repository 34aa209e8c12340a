"""The parts of examples/linearize_lm.py that stand by themselves, and a run of a few steps."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from examples import linearize_lm as lm
from examples.linearize_lm import CONVERSIONS, Batches, Bytes, Conversion


def model(layers: int = 4) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=layers,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=600)  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_batches_repeat_and_stay_within_the_budget() -> None:
    data = Bytes(windows=1)
    first, again = list(Batches(data)), list(Batches(data))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == (2, lm.LENGTH)
    assert len(first) >= lm.BUDGET // (2 * lm.LENGTH)
    assert 7 < data.bits(model()) < 9.5


CURVES = {"one": [(0, 5.0), (1000, 2.0), (2000, 1.5)], "two": [(0, 3.0), (2000, 1.3)]}


def test_the_plot_shows_every_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    shown: dict[str, list[tuple[float, float]]] = {}
    close = plt.close

    def look(figure: Any) -> None:
        for line in figure.axes[0].get_lines():
            shown[line.get_label()] = [(float(x), float(y)) for x, y in line.get_xydata()]
        close(figure)

    monkeypatch.setattr(plt, "close", look)
    assert lm.plot(CURVES, 1.2, tmp_path).read_bytes().startswith(b"\x89PNG")
    assert {name: shown[name] for name in CURVES} == {n: [(t / 1e3, v) for t, v in c] for n, c in CURVES.items()}


def test_the_plot_without_matplotlib_shows_every_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    root = ET.parse(lm.plot(CURVES, 1.2, tmp_path)).getroot()
    lines = [e for e in root if e.tag.endswith("polyline")]
    assert len(lines) == 2
    points = [tuple(float(x) for x in p.split(",")) for p in lines[0].attrib["points"].split()]
    assert len(points) == 3
    assert points[0][0] < points[1][0] < points[2][0] <= 620
    assert 30 <= points[0][1] < points[1][1] < points[2][1] <= 320  # losses fall, and down is down
    assert {e.text for e in root if e.tag.endswith("text")} >= {"one", "two"}


def test_a_hybrid_heals_the_layers_that_it_rewrote() -> None:
    teacher, data = model(), Bytes(windows=1)
    done = CONVERSIONS["hybrid"].heal(teacher, data, 2 * lm.LENGTH + 1, evaluations=1)
    assert [p.step for p in done.curve] == [0, 1, 2]
    assert done.tokens == 2 * lm.LENGTH
    assert all(0 < p.loss < 20 for p in done.curve[1:])
    assert lm.blocks(done.student) == tuple(f"model.layers.{i}" for i in range(4))
    kept = {fqn for fqn, m in done.student.named_modules() if fqn.endswith("self_attn") and "_gatecc" not in vars(m)}
    assert kept == {"model.layers.3.self_attn"}


def test_the_footprint_of_softmax_grows_with_the_length() -> None:
    (short, small, _), (long, large, _) = lm.footprint(model(layers=1), (64, 256), repeats=1)
    assert (short, long) == (64, 256)
    assert large > 3 * small


def test_the_whole_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(layers=1).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(lm, "LENGTHS", (64,))
    monkeypatch.setitem(CONVERSIONS, "gates", Conversion("gates", "gated-attention"))
    app = lm.typer.Typer()
    app.command()(lm.main)
    arguments = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--budget", "2048"]
    result = CliRunner().invoke(app, [*arguments, "--only", "gates", "--windows", "1", "--length", "8"])
    assert result.exit_code == 0, result.output
    assert "held-out bits per byte" in result.output
    assert "one more token" in result.output
    assert (tmp_path / "out" / "gates" / "heal.json").exists()
