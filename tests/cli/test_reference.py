from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gatecc.cli.reference import load_model, parse_options
from gatecc.errors import ArgumentError

SOURCE = """
import torch
from sibling_of_cli_models import WIDTH

model = torch.nn.Linear(WIDTH, 2)
inputs = (torch.ones(2, WIDTH),)

def make():
    return torch.nn.Linear(WIDTH, 3)

def both():
    return make(), inputs

def broken():
    raise RuntimeError("no weights here")

class Zoo:
    make = staticmethod(both)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "cli_models.py").write_text(SOURCE)
    (tmp_path / "sibling_of_cli_models.py").write_text("WIDTH = 4")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("cli_models", "sibling_of_cli_models"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("module", ["cli_models", "cli_models.py"])
@pytest.mark.parametrize(
    ("name", "inputs"), [("both", None), ("Zoo.make", None), ("make", "inputs"), ("model", "inputs")]
)
def test_modules_files_factories_and_models(folder: Path, module: str, name: str, inputs: str | None) -> None:
    model, example = load_model(f"{module}:{name}", inputs and f"{module}:{inputs}")
    assert isinstance(model, nn.Linear)
    assert model(*example).shape[0] == 2


def test_a_file_elsewhere_finds_its_siblings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    model, example = load_model(f"{folder / 'cli_models.py'}:both", None)
    assert torch.equal(example[0], torch.ones(2, 4))
    assert isinstance(model, nn.Linear)


def test_inputs_win_over_those_of_the_factory(folder: Path) -> None:
    (folder / "other_inputs_of_cli.py").write_text("def few(): return {'input': 1}")
    assert load_model("cli_models:both", "other_inputs_of_cli:few")[1] == {"input": 1}


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("cli_models", "module:factory"),
        (":both", "module:factory"),
        ("cli_models:", "module:factory"),
        ("no_such_module_for_cli:both", "ModuleNotFoundError"),
        ("missing.py:both", "no such file"),
        ("cli_models:nothing", "one of .*both"),
        ("cli_models:broken", "no weights here"),
        ("cli_models:inputs", "this is no model"),
        ("cli_models:make", "--inputs"),
    ],
)
def test_each_mistake_is_named(folder: Path, reference: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        load_model(reference, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("0.5", 0.5), ("true", True), ("False", False), ("None", None), ("head", "head"), ("[1, 2]", [1, 2])],
)
def test_option_values(text: str, value: Any) -> None:
    assert parse_options([f"x={text}"]) == {"x": value}


@given(st.dictionaries(st.text("abc_", min_size=1), st.text(), max_size=3))
def test_text_passes_unless_it_is_json(options: dict[str, str]) -> None:
    settings = [f"{name}={text!r}x" for name, text in options.items()]
    assert parse_options(settings) == {name: f"{text!r}x" for name, text in options.items()}


@pytest.mark.parametrize("setting", ["heads", "=4", ""])
def test_settings_without_a_value(setting: str) -> None:
    with pytest.raises(ArgumentError, match="field=value"):
        parse_options([setting])
