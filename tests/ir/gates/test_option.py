"""Options as text and JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.activation import Activation, OnePlusTanh, Softmax
from gatecc.ir.gates.estimator import Estimator, StraightThrough
from gatecc.ir.gates.init import Init, Reuse
from gatecc.ir.gates.label import TopKMass
from gatecc.ir.gates.option import Option
from gatecc.ir.gates.scorer import LowRank, Scorer
from gatecc.ir.gates.source import Concat, Cond, Pool, Source, Stage
from tests.ir.gates.specs import specs


@given(specs())
def test_text_and_json_are_inverse(spec: GateSpec) -> None:
    assert GateSpec.parse(str(spec)) == spec
    assert GateSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert hash(GateSpec.parse(str(spec))) == hash(spec)


@pytest.mark.parametrize(
    ("slot", "text", "option"),
    [
        (Scorer, "lowrank(16)", LowRank(16)),
        (Scorer, "lowrank(r=16)", LowRank(16)),
        (Activation, "softmax(T=2)", Softmax(T=2.0)),
        (Activation, "1+tanh", OnePlusTanh()),
        (Activation, "1 + tanh", OnePlusTanh()),
        (Estimator, "ST", StraightThrough()),
        (Init, "reuse(model.layers.0.q_proj.weight)", Reuse("model.layers.0.q_proj.weight")),
        (Source, "in", Stage("in")),
        (Source, "pool(in, kind=max)", Pool(Stage("in"), "max")),
        (Source, "pool(skip)+branch+cond(class)", Concat((Pool(Stage("skip")), Stage("branch"), Cond("class")))),
        (Source, "stage(logits)", Stage("logits")),
        (
            Estimator,
            "supervised(label=topk_mass(r=0.5))",
            Estimator.from_json({"type": "supervised", "label": TopKMass(0.5)}),
        ),
    ],
)
def test_spellings(slot: type[Option], text: str, option: Option) -> None:
    assert slot.parse(text) == option
    assert slot.parse(str(option)) == option
    assert slot.from_json(option.to_json()) == option


@pytest.mark.parametrize(
    ("slot", "text", "said"),
    [
        (Scorer, "liner", "lowrank(r)"),
        (Scorer, "lowrank", "lowrank(r)"),
        (Scorer, "lowrank(16, 2)", "lowrank(r)"),
        (Scorer, "lowrank(0)", "positive integer"),
        (Scorer, "lowrank(1.5)", "int"),
        (Activation, "softmax(T=abc)", "float"),
        (Activation, "softmax(T=0)", "positive"),
        (Activation, "softmax(pre_activation=cosine)", "none | tanh"),
        (Activation, "sigmoid(scale=__import__('os'))", "float"),
        (Activation, "softmax(", "a name, or a name with arguments"),
        (Source, "pool(pool(hidden))", "a stage, cond"),
        (Source, "hidden+param", "skip+branch"),
    ],
)
def test_errors_say_what_is_accepted(slot: type[Option], text: str, said: str) -> None:
    with pytest.raises(ArgumentError, match="GCC009") as error:
        slot.parse(text)
    assert said in str(error.value)


def test_a_whole_gate_as_text() -> None:
    spec = GateSpec.parse("hidden, linear, head, activation=sigmoid, init=identity(how=fold), fuse_into=q_proj")
    assert spec == GateSpec("hidden", "linear", "head", "sigmoid", init="identity(how=fold)", fuse_into="q_proj")
    assert str(spec) == "hidden, linear, head, sigmoid, init=identity(how=fold), fuse_into=q_proj"


@pytest.mark.parametrize(
    "text", ["", "hidden, linear, head, sigmoid, exact, zero, q, more", "hidden, colour=red", "hidden)"]
)
def test_a_bad_gate_as_text(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"source, scorer|a name"):
        GateSpec.parse(text)
