"""A breach names the first node that differs, wherever in the graph a form is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.codegen.onnx.stable import FORMS
from gatecc.errors import ExportError
from gatecc.export.locate import OnnxNode, first_differing

pytest.importorskip("onnxruntime")


def node(operator: str, inputs: str, outputs: str) -> OnnxNode:
    return OnnxNode(f"the {operator}", operator, tuple(inputs.split()), tuple(outputs.split()))


CHAIN = [node("A", "x", "a"), node("B", "a", "b"), node("C", "b a", "c"), node("D", "c", "d")]


def test_the_first_from_which_nothing_agrees() -> None:
    a, b, c, d = (torch.randn(2, 3, 4) for _ in range(4))
    known = [a, b, c, d]

    def guilty(**found: Tensor) -> str | None:
        first = first_differing(CHAIN, {"a": a, "b": b, "c": c, "d": d, **found}, known, 1e-5)
        return None if first is None else first.operator

    assert guilty() is None
    assert guilty(d=d + 1) == "D"
    assert guilty(c=c + 1, d=d + 1) == "C"
    assert guilty(a=a + 1, b=b + 1, c=c + 1, d=d + 1) == "A"
    assert guilty(b=b.transpose(1, 2), c=c + 1, d=d + 1) == "C"  # another layout of the same
    assert guilty(b=b * 2, d=d + 1) == "D"  # a scale that C takes back
    assert guilty(b=torch.zeros(2), c=c + 1, d=d * 2) == "C"  # what is too small to be told from others by its numbers


class Net(nn.Module):
    """Two blocks; the second goes through an operator that has a form of ours: (B, N, 8) -> (B, N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.second = nn.ModuleDict({"inner": nn.Softplus(), "norm": nn.LayerNorm(8)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x).transpose(1, 2).mT
        y = self.second["inner"](x) * 0.3
        return self.second["norm"](y + x)


LINE = Net.forward.__code__.co_firstlineno + 2


@pytest.mark.parametrize("wrong", ["values", "layout"])
def test_a_broken_form_is_named_by_module_and_line(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator: Any = torch.ops.aten.softplus.default
    right = FORMS[operator]

    def broken(x: Tensor, *options: Any) -> Tensor:
        return right(x, *options) * 1.5 if wrong == "values" else right(x, *options).flip(-1)

    monkeypatch.setitem(FORMS, operator, broken)
    with pytest.raises(ExportError) as told:
        gatecc.export(Net().eval(), tmp_path / "x", (torch.randn(2, 5, 8),))
    assert "the first node that differs is" in told.value.found
    assert f"of second.inner, test_locate.py:{LINE}: aten." in told.value.found
    assert ("is Mul second.inner/Mul" in told.value.found) is (wrong == "values")
    assert list(tmp_path.iterdir()) == []
