"""Functions are the nodes of their places by another name: putting them back gives the graph as it was."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gatecc
from gatecc.codegen.onnx.functions import calls, with_functions
from gatecc.codegen.onnx.marks import OPERATOR, REWRITE, WEIGHT, Mark
from gatecc.errors import ArgumentError

ort: Any = pytest.importorskip("onnxruntime")
FLOAT = ir.TensorType(ir.DataType.FLOAT)


def results(proto: onnx.ModelProto, x: Any) -> Any:
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})


def operators(nodes: Any) -> Counter[str]:
    return Counter(n.op_type for n in nodes if n.op_type != "Constant")


@st.composite
def graphs(draw: st.DrawFn) -> ir.Model:
    """Any graph of sums, products and weights, whose nodes are of any places."""
    x = ir.Value(name="x", shape=ir.Shape([3]), type=FLOAT)
    weight = ir.Value(
        name="w", const_value=ir.tensor(np.arange(3, dtype="f"), name="w"), shape=ir.Shape([3]), type=FLOAT
    )
    weight.meta[WEIGHT] = draw(st.booleans())
    values, nodes = [x, weight], []
    for i in range(draw(st.integers(3, 12))):
        kind = draw(st.sampled_from(["Add", "Mul", "Neg"]))
        inputs = [draw(st.sampled_from(values)) for _ in range(1 if kind == "Neg" else 2)]
        node = ir.node(kind, inputs, name=f"n{i}")
        for key in (OPERATOR, REWRITE):
            place = draw(st.sampled_from([None, 0, 1]))
            if place is not None:
                node.meta[key] = Mark(f"{key[-7:]}", f"at.{place}", (place,))
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = f"v{i}", ir.Shape([3]), FLOAT
        values.append(node.outputs[0])
        nodes.append(node)
    ends = list(dict.fromkeys([nodes[-1].outputs[0], *(n.outputs[0] for n in nodes if draw(st.booleans()))]))
    ends += [n.outputs[0] for n in nodes if not n.outputs[0].uses() and n.outputs[0] not in ends]
    graph = ir.Graph([x], ends, nodes=nodes, initializers=[weight], name="g", opset_imports={"": 24})
    return ir.Model(graph, ir_version=10)


@settings(max_examples=25, deadline=None)
@given(graphs())
def test_any_graph_computes_the_same(model: ir.Model) -> None:
    before = ir.to_proto(model)
    made = with_functions(model)
    proto = ir.to_proto(made)
    onnx.checker.check_model(proto, full_check=True)
    x = np.array([1, -2, 3], "f")
    assert all(map(np.array_equal, results(before, x), results(proto, x)))
    inlined = onnx.inliner.inline_local_functions(proto)
    assert operators(inlined.graph.node) == operators(before.graph.node)
    assert ir.to_proto(model) == before
    assert sum(calls(made).values()) == sum(
        n.domain == "gatecc" for part in (proto.graph, *proto.functions) for n in part.node
    )


def test_equal_places_call_one_function() -> None:
    """Two squares of sums, and one of a difference."""
    x, value = (ir.Value(name=name, shape=ir.Shape([3]), type=FLOAT) for name in "xy")
    ends, nodes = [x, value], list[ir.Node]()
    for i, kind in enumerate(("Add", "Add", "Sub")):
        first = ir.node(kind, [value, x], name=f"a{i}")
        second = ir.node("Mul", [first.outputs[0], first.outputs[0]], name=f"b{i}")
        for node in (first, second):
            node.meta[REWRITE] = Mark("square", f"layers.{i}", (i,))
            node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = f"{node.name}_", x.shape, FLOAT
        nodes += [first, second]
        value = second.outputs[0]
    graph = ir.Graph(ends, [value], nodes=nodes, name="g", opset_imports={"": 24})
    made = with_functions(ir.Model(graph, ir_version=10))
    assert [n.name for n in made.graph] == ["layers.0/square", "layers.1/square", "layers.2/square_1"]
    assert {f.name: [n.op_type for n in f] for f in made.functions.values()} == {
        "square": ["Add", "Mul"],
        "square_1": ["Sub", "Mul"],
    }


class Mixing(nn.Module):
    """Linear attention over (B, N, 8), 2 heads, on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y, _ = torch.ops.gatecc.linear_attention(q, k, v, q.sigmoid().log())
        return x + y.transpose(1, 2).flatten(2)


def test_rewrites_and_operators_are_called_by_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    gate = gatecc.Gate(gatecc.Residual[...].branch, gatecc.GateSpec("skip", "linear", "element", "sigmoid"))
    model = gatecc.transform(Mixing().eval(), gate, (x,), verify=False)
    made = gatecc.export(model, tmp_path / "x", (x,), target="portable", functions=True)
    assert len(made.compared) > 4
    assert made.functions == {"gate": 1, "linear_attention": 1}
    proto = onnx.load(tmp_path / "x" / "model.onnx")
    assert [n.op_type for n in proto.graph.node if n.domain == "gatecc"] == ["linear_attention", "gate"]
    inlined = onnx.inliner.inline_local_functions(proto)
    found = sum(operators(inlined.graph.node).values())
    scanned = sum(len(a.g.node) for n in inlined.graph.node for a in n.attribute if a.type == a.GRAPH)
    assert found + scanned == sum(made.operators.values())
    with torch.no_grad():
        expected = model(x).numpy()
    assert np.abs(results(proto, x.numpy())[0] - expected).max() < 1e-5
    with pytest.raises(ArgumentError, match="quantizers"):
        gatecc.export(model, tmp_path / "y", (x,), functions=True, quantize="w8")
