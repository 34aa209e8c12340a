from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import gatecc
from gatecc.cli import app
from gatecc.export import Compared, Exported
from gatecc.export.quantize import Quantize, Quantized
from gatecc.report import Report, RunCost

SOURCE = """
import gatecc
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

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(11, 8), Layer(), nn.Linear(8, 11)

    def forward(self, ids):
        return self.head(self.layer(self.embed(ids)))

def language():
    torch.manual_seed(0)
    return Head(), (torch.randint(11, (2, 5)),)

def batches():
    return [torch.randint(11, (2, 5)) for _ in range(3)]

def mine(granularity="head"):
    'Gates of my own.'
    return gatecc.Gate("attention[...].heads", gatecc.GateSpec("hidden", "linear", granularity, "sigmoid"))

ONE = mine()

def wrong():
    return make()[0], (torch.randn(2, 5, 7),)
"""


HEAL = ("heal", "{model}", "-r", "gated-attention", "--batches", "{file}:batches", "--out", "x")


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


def test_explain_says_what_the_backend_does(model: str, tmp_path: Path) -> None:
    html = tmp_path / "r.html"
    out, _ = run("explain", model, "--training", "--dynamic", "--report", str(html))
    assert "Sequential compiled for training" in out
    assert "compiled for training" in html.read_text()
    out, _ = run("explain", model, "--json", "--freeze")
    assert Report.from_json(out).compiled == "inference"
    run("explain", model.replace(":make", ":wrong"), code=2)


def test_cost_is_counted_and_drawn(model: str, tmp_path: Path) -> None:
    out, err = run("cost", model, "--rounds", "0", "--save", str(tmp_path / "cost.json"))
    assert "operations" in out
    assert "cost.json" in err.replace("\n", "")  # a line of the terminal may end within the path
    assert RunCost.from_json((tmp_path / "cost.json").read_text()).samples == 2
    out, _ = run("cost", model, "--json", "--each", "-r", "gated-attention", "--rounds", "1")
    found = RunCost.from_json(out)
    assert len(found.each) == 2
    assert found.ran.seconds
    _, err = run("cost", model, "-r", "gated-attention", "--checkpoint", "x", code=2)
    assert "one of them" in err


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
        (["transform", "{model}", "-r", "{file}:mone"], "GCC009", "mine"),
        (["transform", "{model}", "-r", "{file}:make"], "GCC009", "not a recipe"),
        (["transform", "{model}", "-r", "{file}:mine", "--set", "hue=1"], "GCC009", "granularity"),
        (["transform", "{model}", "-r", "{file}:ONE", "--set", "hue=1"], "GCC009", "takes no options"),
        ([*HEAL], "GCC009", "no stage to run"),
        ([*HEAL, "--tune", "stepps=1"], "GCC009", "steps"),
        ([*HEAL, "--tune", "lr=1"], "GCC009", "steps"),
        ([*HEAL, "--tune", "steps=1", "--batches", "{file}:make_nothing"], "GCC009", "batches"),
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
    asked: list[dict[str, Any]] = []
    grouped: list[bool] = []
    record = Exported(
        folder=tmp_path,
        files={},
        opset=24,
        ir_version=10,
        inputs={"x": ["batch", 8]},
        outputs={"y": [1]},
        operators={"Add": 2, "MatMul": 3},
        compared=(Compared({"batch": 3}, 1.5e-7),),
        notes=("a note",),
        lowered={"attention: GroupQueryAttention": 6},
        kept={"gelu: erf: no form": 1},
        quantized=Quantized(Quantize("w8"), {}, {"MatMul: head=False": 1}, {}, 100, 30, "the example inputs", (), {}),
    )

    def export(chosen: torch.nn.Module, folder: Path, inputs: tuple[torch.Tensor, ...], **options: Any) -> Exported:
        asked.append({k: options[k] for k in ("target", "opset", "decode", "quantize", "evaluation_inputs")})
        counts.append(sum(p.numel() for p in chosen.parameters()))
        grouped.append(options["group_experts"])
        assert folder == tmp_path / "onnx"
        assert chosen(*inputs).shape == (2, 5, 8)
        return record

    monkeypatch.setattr(gatecc, "export", export, raising=False)
    out = ["--out", str(tmp_path / "onnx")]
    checkpoint = str(tmp_path / "ckpt")
    run("transform", model, "-r", "gated-attention", "--out", checkpoint)
    told, said = run("export", model, *out, "--target", "portable", "--opset", "25", "--decode", "--quantize", "w8")
    assert told == f"{tmp_path / 'onnx'}\n"
    expected = (
        "x (batch, 8)",
        "5, opset 24",
        "at 1 sizes, largest difference 1.5e-07",
        "0.30x the bytes",
        "note: a note",
    )
    assert all(text in said for text in (*expected, "GroupQueryAttention", "gelu: erf: no form", "MatMul: head=False"))
    wanted = {"target": "portable", "opset": 25, "decode": True, "quantize": "w8", "evaluation_inputs": None}
    assert asked == [wanted]
    run("export", model, *out, "-r", "gated-attention")
    run("export", model, *out, "--checkpoint", checkpoint, "--no-group-experts")
    assert grouped == [True, True, False]
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
    assert all(name in out for name in ("inspect", "transform", "export", "heal", "recipes", "doctor"))


@pytest.mark.parametrize(("name", "settings"), [("ONE", []), ("mine", ["--set", "granularity=element"])])
def test_a_recipe_of_one_s_own(model: str, tmp_path: Path, name: str, settings: list[str]) -> None:
    file = model.rpartition(":")[0]
    words = ["transform", model, "-r", f"{file}:{name}", *settings, "--out", str(tmp_path / "c")]
    out, _ = run(*words, "--only-new", "--json")
    report = Report.from_json(out)
    assert report.recipe == name
    assert {row.rewrite for row in report.rewrites} == {"gate"}
    assert (tmp_path / "c" / "new.safetensors").exists()
    base, inputs = sys.modules["model_of_cli_test"].make()
    loaded = gatecc.load(base, tmp_path / "c")
    torch.testing.assert_close(loaded(*inputs), base(*inputs))


def test_heal_trains_and_saves(model: str, tmp_path: Path) -> None:
    file = model.rpartition(":")[0]
    words = ["heal", f"{file}:language", "-r", "gated-attention", "--batches", f"{file}:batches"]
    _, err = run(*words, "--tune", "steps=2", "--tune", "distill=1.0", "--out", str(tmp_path / "c"))
    assert "in 2 steps" in err
    base, inputs = sys.modules["model_of_cli_test"].language()
    loaded = gatecc.load(base, tmp_path / "c")
    assert not torch.equal(loaded(*inputs), base(*inputs))
    assert bool(loaded.get_parameter("layer.gate.weight").any())


def test_version() -> None:
    out, _ = run("--version")
    assert out.startswith("gatecc ")
    assert torch.__version__.partition("+")[0] in out
