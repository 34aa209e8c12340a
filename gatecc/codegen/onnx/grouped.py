"""Grouped rows: each row times the matrix of its group, which is how a mixture of experts runs its experts.

Forms of operators ask for it with one symbolic node. What ONNX has for it depends on the weights, which are known when
the graph is written: one Split of the sorted rows, whose sizes are counted when the graph runs, a Gemm for each group
on a matrix of its own, and a Concat. Nothing is computed for a group without rows, and the number of rows stays free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, Any]

_DOMAIN, _NAME = "gatecc", "GroupedRows"


def grouped_rows(x: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The node. x: (S, K), sorted by group; weight: (G, N, K); bias: (G, N) -> (S, N).

    counts: (G + 1,) int64, how many rows each group has, and how many at the end have none: their results are zeros.
    """
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{_NAME}",
        [x, counts, weight, bias],
        dtype=x.dtype,
        shape=(x.size(0), weight.size(1)),
        version=1,
    )


def split_groups(model: ir.Model) -> None:
    """Put standard operators in the place of every such node; stacked weights become initializers, one for a group."""
    made: dict[tuple[str, int], ir.Value] = {}
    for node in list(model.graph.all_nodes()):
        if node.domain == _DOMAIN and node.op_type == _NAME:
            _Expansion(model.graph, node, made).run()
    model.opset_imports.pop(_DOMAIN, None)


class _Expansion:
    """One node, maybe in a branch of the graph. ``made`` has what earlier nodes have made of the same weights."""

    def __init__(self, graph: ir.Graph, node: ir.Node, made: dict[tuple[str, int], ir.Value]) -> None:
        self.graph, self.node, self.made = graph, node, made
        x, counts, weight, *rest = node.inputs
        assert x is not None
        assert counts is not None
        assert weight is not None
        self.x, self.counts, self.weight, self.bias = x, counts, weight, rest[0] if rest else None
        assert weight.shape is not None
        assert node.outputs[0].dtype is not None
        self.out, self.dtype = node.outputs[0], node.outputs[0].dtype
        self.groups, self.N, self.K = (cast("int", size) for size in weight.shape)
        self.count = 0

    def run(self) -> None:
        held, bias = _held(self.weight), None if self.bias is None else _held(self.bias)
        rows = self.add("Split", [self.x, self.counts], self.groups + 1, (None, self.K), {"axis": 0})
        parts = [self.product(x, g, held, bias) for g, x in enumerate(rows[:-1])]
        (size,) = self.add("Shape", [rows[-1]], 1, (1,), {"start": 0, "end": 1}, integer=True)
        (shape,) = self.add("Concat", [size, self.number([self.N], "columns")], 1, (2,), {"axis": 0}, integer=True)
        (none,) = self.add("Expand", [self.constant(torch.zeros(1, dtype=_torch(self.dtype)), "zero"), shape])
        (joined,) = self.add("Concat", [*parts, none], 1, (None, self.N), {"axis": 0})
        joined.shape = self.out.shape
        sources = [self.weight, *([] if self.bias is None else [self.bias])]
        name = self.out.name
        self.out.replace_all_uses_with(joined, replace_graph_outputs=True)
        _graph_of(self.node).remove(self.node, safe=True)
        joined.name = name
        for source in sources:
            _drop(self.graph, source)

    def product(self, x: ir.Value, group: int, held: Array | None, bias: Array | None) -> ir.Value:
        """The rows of one group times its matrix, as it lies in memory."""
        if held is None:
            (matrix,), flipped = self.add("Gather", [self.weight, self.index(group)], 1, (self.N, self.K)), True
        else:
            flipped = held[group].flags.c_contiguous or not held[group].T.flags.c_contiguous
            matrix = self.slice(self.weight, held[group] if flipped else held[group].T, group)
        inputs = [x, matrix]
        if self.bias is not None and bias is not None:
            inputs.append(self.slice(self.bias, bias[group], group))
        elif self.bias is not None:
            inputs += self.add("Gather", [self.bias, self.index(group)], 1, (self.N,))
        return self.add("Gemm", inputs, 1, (None, self.N), {"transB": int(flipped)})[0]

    def add(
        self,
        kind: str,
        inputs: Sequence[ir.Value],
        outputs: int = 1,
        shape: Sequence[int | None] = (None, None),
        attributes: dict[str, Any] | None = None,
        *,
        integer: bool = False,
    ) -> Sequence[ir.Value]:
        """Nodes of the standard before the node itself, which tells where they come from."""
        import onnx_ir as ir

        self.count += 1
        name = f"{self.node.name}_{kind.lower()}_{self.count}"
        made = ir.node(kind, inputs, attributes, num_outputs=outputs, name=name)
        for i, value in enumerate(made.outputs):
            value.name = f"{name}_{i}"
            value.shape, value.dtype = ir.Shape(shape), ir.DataType.INT64 if integer else self.dtype
        made.meta.update(self.node.meta)
        _graph_of(self.node).insert_before(self.node, made)
        return made.outputs

    def slice(self, of: ir.Value, tensor: Array, group: int) -> ir.Value:
        """The part of a stacked weight that is one group's, as an initializer; no numbers are copied."""
        key = (str(_source(of).name), group)
        if key not in self.made:
            self.made[key] = self.constant(tensor, f"{key[0]}.{group}")
        return self.made[key]

    def index(self, group: int) -> ir.Value:
        return self.constant(torch.tensor(group), f"group.{group}")

    def number(self, values: list[int], name: str) -> ir.Value:
        return self.constant(torch.tensor(values), name)

    def constant(self, tensor: Array | Tensor, name: str) -> ir.Value:
        """A new initializer; if the name is taken, with another one."""
        import onnx_ir as ir

        taken, given = self.graph.initializers, name
        while name in taken:
            self.count += 1
            name = f"{given}_{self.count}"
        held = ir.tensor(tensor, name=name)
        value = ir.Value(name=name, const_value=held, shape=ir.Shape(tensor.shape), type=ir.TensorType(held.dtype))
        self.graph.initializers.add(value)
        return value


def _held(value: ir.Value) -> Array | None:
    """The numbers of an initializer, maybe transposed in the graph; None if they are computed."""
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        inner = _held(node.inputs[0])
        order = node.attributes.get("perm")
        return None if inner is None or order is None else inner.transpose(order.as_ints())
    return None if node is not None or value.const_value is None else value.const_value.numpy()


def _source(value: ir.Value) -> ir.Value:
    """The initializer of what ``_held`` has read."""
    node = value.producer()
    return value if node is None or node.inputs[0] is None else _source(node.inputs[0])


def _drop(graph: ir.Graph, value: ir.Value) -> None:
    """Remove what nobody reads any more: a transposed weight, an initializer."""
    if value.uses() or value.is_graph_output():
        return
    node = value.producer()
    if node is None:
        graph.initializers.pop(str(value.name), None)
        return
    inputs = [v for v in node.inputs if v is not None]
    if node.op_type == "Transpose":
        _graph_of(node).remove(node, safe=True)
        for source in inputs:
            _drop(graph, source)


def _graph_of(node: ir.Node) -> Any:
    assert node.graph is not None
    return node.graph


def _torch(dtype: Any) -> torch.dtype:
    return {"FLOAT": torch.float32, "DOUBLE": torch.float64, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}[
        dtype.name
    ]
