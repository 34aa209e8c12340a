from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import gatecc
from gatecc.cli import app
from gatecc.report import Report

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

def make():
    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer()), (torch.randn(2, 5, 8),)

def wrong():
    return make()[0], (torch.randn(2, 5, 7),)
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    file = tmp_path / "model_of_cli_test.py"
    file.write_text(SOURCE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield f"{file}:make"
    sys.modules.pop(file.stem, None)


def run(*words: str, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout, result.stderr


def test_inspect_prints_tables_and_writes_the_report(model: str, tmp_path: Path) -> None:
    out, err = run("inspect", model, "--report", str(tmp_path / "r.json"))
    assert "attention" in out
    assert "[0-1]" in out
    assert "r.json" in err
    found = Report.from_json((tmp_path / "r.json").read_text())
    assert sum(site.kind == "attention" for site in found.sites) == 2


def test_json_on_standard_output_is_only_json(model: str, tmp_path: Path) -> None:
    html, dot = tmp_path / "r.html", tmp_path / "g.dot"
    out, _ = run("inspect", model, "--json", "--report", str(html), "--report", str(dot))
    assert Report.from_json(out).model == "Sequential"
    assert html.read_text().startswith("<!doctype html>")
    assert "scaled_dot_product_attention" in dot.read_text()


def test_transform_saves_what_python_loads(model: str, tmp_path: Path) -> None:
    out, _ = run("transform", model, "--recipe", "gated-attention", "--out", str(tmp_path / "ckpt"), "--json")
    assert Report.from_json(out).totals.contract_held
    module = sys.modules["model_of_cli_test"]
    base, inputs = module.make()
    loaded = gatecc.load(base, tmp_path / "ckpt")
    expected, _ = module.make()
    torch.testing.assert_close(loaded(*inputs), expected(*inputs))
    assert len(list(loaded.parameters())) > len(list(expected.parameters()))


def test_options_reach_the_recipe(model: str) -> None:
    name = next(iter(gatecc.recipe("gated-attention").options), ("position", ""))[0]
    _, err = run("transform", model, "-r", "gated-attention", "--set", "no_such_option=1", code=2)
    assert "no_such_option" in err
    assert name in err


def test_transform_without_out_says_that_nothing_is_saved(model: str) -> None:
    _, err = run("transform", model, "-r", "gated-attention")
    assert "--out" in err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["transform", "{model}", "-r", "gated-atention"], "GCC002", "gated-attention"),
        (["inspect", "{file}:wrong"], "GCC001", "the model does not run"),
        (["inspect", "{file}:nothing"], "GCC009", "make"),
        (["inspect", "{model}", "--report", "x.pdf"], "GCC009", ".html"),
        (["recipes", "gated-atention"], "GCC002", "gated-attention"),
    ],
)
def test_errors_are_their_text_and_code_2(model: str, words: list[str], code: str, text: str) -> None:
    words = [word.format(model=model, file=model.rpartition(":")[0]) for word in words]
    out, err = run(*words, code=2)
    assert not out
    assert code in err
    assert text in err
    assert "Traceback" not in err


def test_traceback_on_request(model: str) -> None:
    _, err = run("inspect", model.replace(":make", ":nothing"), "--traceback", code=2)
    assert "Traceback" in err
    assert "GCC009" in err


def test_export_takes_the_model_a_recipe_or_a_checkpoint(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def export(chosen: torch.nn.Module, folder: Path, inputs: tuple[torch.Tensor, ...]) -> None:
        counts.append(sum(p.numel() for p in chosen.parameters()))
        assert folder == tmp_path / "onnx"
        assert chosen(*inputs).shape == (2, 5, 8)

    monkeypatch.setattr(gatecc, "export", export, raising=False)
    out = ["--out", str(tmp_path / "onnx")]
    checkpoint = str(tmp_path / "ckpt")
    run("transform", model, "-r", "gated-attention", "--out", checkpoint)
    run("export", model, *out)
    run("export", model, *out, "-r", "gated-attention")
    run("export", model, *out, "--checkpoint", checkpoint)
    assert counts[0] < counts[1] == counts[2]
    _, err = run("export", model, *out, "-r", "gated-attention", "--checkpoint", checkpoint, code=2)
    assert "one of them" in err


def test_recipes_are_listed_and_described() -> None:
    out, _ = run("recipes")
    assert all(info.name in out for info in gatecc.recipes())
    rows = json.loads(run("recipes", "--json")[0])
    assert [row["name"] for row in rows] == [info.name for info in gatecc.recipes()]
    for info in gatecc.recipes():
        out, _ = run("recipes", info.name)
        assert all(option in out for option in info.options)


def test_doctor_lists_and_its_code_tells_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = run("doctor")
    assert "torch" in out
    assert json.loads(run("doctor", "--json")[0])["installed"]
    monkeypatch.setattr("gatecc.cli.doctor.TORCH", "99.0")
    _, err = run("doctor", code=1)
    assert "99.0" in err


def test_help_names_every_command() -> None:
    out, _ = run("--help")
    assert all(name in out for name in ("inspect", "transform", "export", "recipes", "doctor"))
