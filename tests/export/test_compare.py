"""Rounding is no error and a fault is one; sizes are free where the model runs at others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.codegen.onnx.reference import drawn, reference
from gatecc.codegen.onnx.stable import FORMS
from gatecc.errors import ExportError

pytest.importorskip("onnxruntime")


class Rounding(nn.Module):
    """What float32 loses of a product of 512 terms, made large: in float64 it is 0, in float32 nobody knows."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.randn(512, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight - (x.double() @ self.weight.double()).float()) * self.factor


def test_rounding_is_judged_by_torchs_own(tmp_path: Path) -> None:
    x = torch.randn(4, 512)
    own = Rounding(1.0)(x).abs().max().item()
    made = gatecc.export(Rounding(3e-3 / own), tmp_path, (x,), verify=True)
    assert any("from float64, of which torch itself is 0.003" in note for note in made.notes)
    assert 1e-4 < max(c.error for c in made.compared) <= 1e-2


def test_a_model_that_is_mostly_rounding_proves_nothing(tmp_path: Path) -> None:
    x = torch.randn(4, 512)
    own = Rounding(1.0)(x).abs().max().item()
    with pytest.raises(ExportError, match=r"from float64 torch is 0\.3"):
        gatecc.export(Rounding(0.3 / own), tmp_path / "x", (x,))


class Magnified(nn.Module):
    """A difference of neighbours, whose error in torch happens to be none: softplus is x itself there."""

    def forward(self, x: Tensor) -> Tensor:
        return (nn.functional.softplus(x) - 32) * 100


@pytest.mark.parametrize("units", [1, 30])
def test_torch_may_be_lucky_and_a_fault_is_none(units: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit in the last place is 3.8e-4 of the result, thirty are no rounding."""
    operator = torch.ops.aten.softplus.default
    right = FORMS[operator]
    monkeypatch.setitem(FORMS, operator, lambda x, *args: right(x, *args) + units * 2**-18)
    x = 32 + torch.rand(3, 64) / 128
    if units == 1:
        made = gatecc.export(Magnified(), tmp_path / "x", (x,))
        assert 2e-4 < max(c.error for c in made.compared) < 8e-4
    else:
        with pytest.raises(ExportError, match=r"(?s)from float64 torch is 0 off, .*at most 0\.000[5-8]"):
            gatecc.export(Magnified(), tmp_path / "x", (x,))


def test_rounding_that_is_drawn() -> None:
    """A difference of 1e-3 between numbers near 1 is off by some units over 1e-3; whole numbers and views are exact."""

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.cos(x) * torch.ones(4096), torch.cos(y)
        return (a - b).view(64, 64).mT.reshape(-1), (x * 0 + 5).floor() + torch.arange(4096).float()

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return f(x, y)

    leaves = torch.zeros(4096), torch.full((4096,), (2 * 1e-3) ** 0.5)
    program = torch.export.export(Two(), leaves)
    exact, draws = reference(program, leaves), drawn(program, leaves)
    unit = 2**-24 / 1e-3
    for draw in draws:
        gap = (draw[0] - exact[0]).abs() / exact[0]
        assert 0.9 * unit < float(gap.max()) < 1.1 * unit  # cos(0) is whole: the other alone is moved, by half a unit
        assert torch.equal(draw[1], exact[1])
    assert not torch.equal(draws[0][0], draws[1][0])


def test_rounding_of_products_is_that_of_sums_in_a_row() -> None:
    """As far off as float32 is that adds one product after the other; whole numbers are multiplied exactly."""

    class Products(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            return x @ w, (x * 8).round() @ (w * 8).round()

    torch.manual_seed(0)
    leaves = torch.randn(64, 512), torch.randn(512, 64)
    program = torch.export.export(Products(), leaves)
    exact, draws = reference(program, leaves), drawn(program, leaves)
    found = leaves[0][:, :1] * leaves[1][:1]
    for k in range(1, 512):
        found = found + leaves[0][:, k : k + 1] * leaves[1][k : k + 1]
    off = (found.double() - exact[0]).square().mean().sqrt()
    for draw in draws:
        assert 0.5 * off < (draw[0] - exact[0]).square().mean().sqrt() < 2 * off
        assert torch.equal(draw[1], exact[1])


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.logsigmoid(x)


def test_a_fault_of_the_graph_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = torch.ops.aten.log_sigmoid.default
    right = FORMS[operator]
    monkeypatch.setitem(FORMS, operator, lambda x: right(x) * 1.001)
    with pytest.raises(ExportError, match=r"(?s)does not compute what the model does.*ONNX Runtime 0\.00"):
        gatecc.export(Log(), tmp_path / "x", (torch.randn(2, 3),))
    assert not (tmp_path / "x").exists()


class Drifting(nn.Module):
    """Off by a little more with each call: that is no rounding, though float64 differs from it as well."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls * 1e-3


def test_a_model_that_changes_from_call_to_call_is_not_excused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not compute"):
        gatecc.export(Drifting(), tmp_path / "x", (torch.rand(2, 3),))


class OneLength(nn.Module):
    """Raises at any other number of tokens, in Python."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and x.shape[1] != 7:
            raise ValueError("7 tokens")
        return x.sum((1, 2)) * y.sum()


def test_a_size_that_runs_alone_is_fixed_and_said(tmp_path: Path) -> None:
    made = gatecc.export(OneLength(), tmp_path, (torch.randn(2, 7, 4), torch.randn(5)))
    assert made.inputs == {"x": ["batch", 7, "x_2"], "y": ["y_batch"]}
    assert made.dims == ("batch", "x_2", "y_batch")
    assert made.notes == ("fixed, for the model runs at no other size that was tried: sequence 7",)
    assert {"sequence"} & set(made.compared[0].sizes) == set()
    session: Any = __import__("onnxruntime").InferenceSession(str(tmp_path / "model.onnx"))
    assert session.get_inputs()[0].shape == ["batch", 7, "x_2"]


def test_heads_on_an_axis_of_an_input(tmp_path: Path) -> None:
    """Their number is an attribute of the node."""

    class Heads(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
            return torch.ops.gatecc.linear_attention(q, k, v, g)[0]

    q, k, v = (torch.randn(2, 3, 9, 4) for _ in range(3))
    made = gatecc.export(Heads(), tmp_path, (q, k, v, -torch.rand(2, 3, 9, 4)))
    assert [shape[1::2] for shape in made.inputs.values()] == [[3, 4]] * 4
    assert len(made.compared) == 4


class OneSample(nn.Module):
    """``excluded``: torch.export makes a condition of it that the batch is not 1, else it takes that for granted.
    ``factor``: what one sample is computed by."""

    def __init__(self, excluded: bool, factor: float) -> None:
        super().__init__()
        self.excluded, self.factor = excluded, factor

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        several = batch * length > length + 1 if self.excluded else batch != 1
        return x.sum(1) if several else x.sum(1) * self.factor


@pytest.mark.parametrize("excluded", [False, True])
def test_one_sample_is_compared_whatever_torch_assumes_of_it(excluded: bool, tmp_path: Path) -> None:
    made = gatecc.export(OneSample(excluded, 1.0), tmp_path / "x", (torch.randn(2, 5, 4),))
    assert {c.sizes["batch"] for c in made.compared} == {1, 3}
    for factor in (1.003, 2.0):
        with pytest.raises(ExportError, match=r"(?s)output at batch 1.*the model computes otherwise there"):
            gatecc.export(OneSample(excluded, factor), tmp_path / "y", (torch.randn(2, 5, 4),))
    assert not (tmp_path / "y").exists()
