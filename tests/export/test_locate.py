"""A breach names the first node that differs, wherever in the graph a form is wrong."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.codegen.onnx.stable import FORMS
from gatecc.errors import ExportError
from gatecc.export.locate import OnnxNode, first_differing
from tests.decoder.mixing import LinearAttention, Mixed, V
from tests.decoder.runtime.test_context import Conditioned

pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")
DECODE = sys.modules["gatecc.export.decode"]  # the module: the attribute of the package is its function


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
    rows = a.flatten(0, 1)
    assert first_differing(CHAIN[:1], {"a": rows.flip(0)}, [rows], 1e-5) is None  # tokens in another order
    assert first_differing(CHAIN[:1], {"a": rows.flip(1)}, [rows], 1e-5) is not None
    assert guilty(b=b * 2, d=d + 1) == "D"  # a scale that C takes back
    assert guilty(b=torch.zeros(2), c=c + 1, d=d * 2) == "C"  # what is too small to be told from others by its numbers


def test_each_result_of_a_node_is_judged_by_itself() -> None:
    """Attention that is wrong and hands right keys on; a product that was packed, whose pieces alone are known."""
    q, k, y, z = (torch.randn(2, 3, 4) for _ in range(4))
    nodes = [node("Pack", "x", "qk"), node("Attend", "qk", "y key unread"), node("Out", "y", "z")]
    found = {"qk": torch.cat([q, k], -1), "y": y, "key": k.mT, "unread": z * 2, "z": z}

    def guilty(**other: Tensor) -> str | None:
        first = first_differing(nodes, {**found, **other}, [q, k, y, z], 1e-5, ends=["z", "key"])
        return None if first is None else first.operator

    assert guilty() is None
    assert guilty(z=z + 1) == "Out"
    assert guilty(z=z + 1, y=y + 1) == "Attend"
    assert guilty(key=k + 1) == "Attend"
    assert guilty(z=z + 1, y=y + 1, key=k + 1) == "Attend"
    assert guilty(z=z + 1, y=y + 1, key=k + 1, qk=torch.cat([q, k + 1], -1)) == "Pack"


def test_a_choice_that_comes_out_right_says_nothing_of_what_it_was_made_of() -> None:
    """A router behind an error chooses the experts that it should, as long as the error is small."""
    a, b, z = (torch.randn(2, 3, 4) for _ in range(3))
    top, index = b.topk(2)
    index = index.repeat(1, 1, 4)
    nodes = [
        node("Bad", "x", "a"),
        node("Norm", "a", "b"),
        node("TopK", "b", "top index"),
        node("Out", "top b index", "z"),
    ]
    wrong = {"a": a * 1.01, "b": b * 1.01, "top": top * 1.01, "index": index, "z": z * 1.01}
    first = first_differing(nodes, wrong, [a, b, top, index, z], 1e-5, ends=["z"])
    assert first is not None
    assert first.operator == "Bad"
    alone = [node("Negate", "x", "n"), node("ArgMax", "n", "index"), node("Out", "index", "z")]
    found = {"n": a - 7, "index": index, "z": z}
    assert first_differing(alone, found, [index, z], 1e-5, ends=["z"]) is None


def test_rows_that_a_split_has_taken_out() -> None:
    """Of each expert's tokens the rows are known, in a value of all of them."""
    x, h, y, z = (torch.randn(5, 8) for _ in range(4))
    nodes = [
        node("Split", "x", "x0 x1"),
        *(node(f"Up{i}", f"x{i}", f"h{i}") for i in range(2)),
        node("Join", "h0 h1", "h"),
        node("Act", "h", "y"),
        node("Part", "y", "y0 y1"),
        *(node(f"Down{i}", f"y{i}", f"z{i}") for i in range(2)),
        node("Whole", "z0 z1", "z"),
    ]

    def guilty(**wrong: Tensor) -> str | None:
        found = {"x0": x[:2], "x1": x[2:], "h0": h[:2], "h1": h[2:], "h": h, "y": y, "y0": y[:2], "y1": y[2:]}
        found |= {"z0": z[:2], "z1": z[2:], "z": z, **wrong}
        first = first_differing(nodes, found, [x, h, y, z], 1e-5, ends=["z"])
        return None if first is None else first.operator

    assert guilty() is None
    assert guilty(z1=z[2:] + 1, z=z + 1) == "Down1"
    assert guilty(z=z + 1) == "Whole"
    assert guilty(y1=y[2:] + 1, z1=z[2:] + 1, z=z + 1) == "Part"
    behind = {"y": y + 1, "y0": y[:2] + 1, "y1": y[2:] + 1, "z0": z[:2] + 1, "z1": z[2:] + 1, "z": z + 1}
    assert guilty(**behind) == "Act"
    assert guilty(h1=h[2:] + 1, h=h + 1, **behind) == "Up1"


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


# --- the files of a decode step ---------------------------------------------------------------------------------------


def with_another(
    monkeypatch: pytest.MonkeyPatch, number: int, operator: str, attribute: str, value: float
) -> list[str]:
    """Have the ``number``-th graph of a step written with another attribute of an operator; the name of the node."""
    right, calls, names = DECODE.build, itertools.count(), list[str]()

    def wrong(*args: Any, **options: Any) -> Any:
        graph = right(*args, **options)
        if next(calls) == number:
            at = next(n for n in graph.model.graph if n.op_type == operator)
            at.attributes[attribute] = ir.AttrFloat32(attribute, value)
            names.append(at.name)
        return graph

    monkeypatch.setattr(DECODE, "build", wrong)
    return names


def test_a_wrong_node_of_a_step_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state that linear attention hands on is right. What lies in the folder stays as it is."""
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "decode.onnx").write_text("old")
    names = with_another(monkeypatch, 0, "LinearAttention", "scale", 0.9)
    with pytest.raises(ExportError, match=r"decode.onnx does not compute what the model does") as told:
        gatecc.export(Mixed(LinearAttention("gated")).eval(), folder, (torch.randint(V, (2, 12)),), decode=True)
    assert names == ["mixer/LinearAttention"]
    assert "first node that differs is LinearAttention mixer/LinearAttention of mixer, mixing.py:" in told.value.found
    assert "com.microsoft.LinearAttention" in told.value.found
    assert [p.name for p in tmp_path.rglob("*")] == ["x", "decode.onnx"]
    assert (folder / "decode.onnx").read_text() == "old"


def test_a_wrong_node_of_an_encoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = with_another(monkeypatch, 1, "Gemm", "alpha", 1.5)
    inputs = {"ids": torch.randint(20, (3, 9)), "features": torch.randn(3, 6)}
    with pytest.raises(ExportError, match=r"encoder.onnx does not compute what the model does") as told:
        gatecc.export(Conditioned().eval(), tmp_path / "x", inputs, decode=True)
    assert f"the first node that differs is Gemm {names[0]} of " in told.value.found
    assert not list(tmp_path.iterdir())
