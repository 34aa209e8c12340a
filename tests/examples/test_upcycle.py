"""examples/upcycle.py on a few batches."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from examples import upcycle
from examples.upcycle import KINDS, Digits, Watch, kind_of, parameters, upcycled


def test_kinds_of_bytes() -> None:
    ids = torch.tensor(list("aZ7 \n([,é".encode()))
    named = [KINDS[i] for i in kind_of(ids)]
    assert named[:5] == ["lower case", "upper case", "digit", "space", "line end"]
    assert named[5:] == ["bracket", "bracket", "punctuation", "other", "other"]


def test_upcycled_starts_as_the_dense_model_and_a_token_meets_one_expert() -> None:
    subject = Digits(epochs=1, more=1)
    routed = upcycled(subject, 4, seed=0)
    x = subject.probe()[0][0]
    with torch.no_grad():
        torch.testing.assert_close(routed(x), subject.model(x), atol=1e-5, rtol=1e-5)
    total, active = parameters(routed)
    dense = sum(p.numel() for p in subject.model.parameters())
    routers = sum(p.numel() for name, p in routed.named_parameters() if "router" in name)
    assert active == dense + routers
    assert total > active

    watch = Watch(subject)
    watch.look(routed)
    assert len(watch.loads) == 3
    for name, (load,) in watch.loads.items():
        assert float(load.sum()) == 1
        torch.testing.assert_close(watch.taken[name].sum(0) / (128 * 16), load)


@pytest.mark.parametrize(
    ("only", "given", "name", "lines"),
    [
        ("digits", "--seeds 2 --epochs 1", "vit-on-digits", ["upcycled, 1 of 3 (seed 1)", "standard error of 2 seeds"]),
        ("bytes", "--budget 8192 --teach 1 --windows 1", "byte-lm", ["upcycled, 1 of 3", "upcycled is better by"]),
    ],
)
def test_both_models_are_trained_and_compared(
    only: str, given: str, name: str, lines: list[str], tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(upcycle.main)
    done = CliRunner().invoke(app, [*f"--only {only} {given} --experts 3 --out".split(), str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert all(line in done.output for line in lines)
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert {p.name for p in tmp_path.iterdir()} == ({f"{name}-load.png", f"{name}-taken.png"} if drawn else set())
