"""Shapes: a reshape whose result is known but for one size needs no shape that is computed when the graph runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gatecc.codegen.onnx.tidy.weights import constant

if TYPE_CHECKING:
    import onnx_ir as ir


def settle_shapes(model: ir.Model) -> None:
    """Give every Reshape a constant shape, where 0 (the size of the input there) and one -1 say all."""
    for graph in model.graphs():
        for node in graph:
            if node.op_type == "Reshape" and not node.domain and constant(node.inputs[1]) is None:
                shape = None if node.inputs[0] is None else reshaped(model.graph, node.inputs[0], node.outputs[0])
                if shape is not None:
                    node.replace_input_with(1, shape)
                    node.attributes.pop("allowzero", None)


def reshaped(graph: ir.Graph, given: ir.Value, result: ir.Value) -> ir.Value | None:
    """The constant that reshapes one value to the shape of another, with 0 and -1; None if that does not say it."""
    wanted = _written(given, result)
    return None if wanted is None else _shape(graph, wanted)


def _written(given: ir.Value, result: ir.Value) -> list[int] | None:
    if given.shape is None or result.shape is None:
        return None
    before: list[Any] = [d if isinstance(d, int) else d.value for d in given.shape]
    after: list[Any] = [d if isinstance(d, int) else d.value for d in result.shape]
    wanted: list[int] = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            if size == 0:
                return None
            wanted.append(size)
        elif size is not None and axis < len(before) and before[axis] == size:
            wanted.append(0)
        else:
            wanted.append(-1)
    return wanted if wanted.count(-1) <= 1 else None


def _shape(graph: ir.Graph, sizes: list[int]) -> ir.Value:
    import onnx_ir as ir

    name = "shape_" + "_".join("n" if s < 0 else str(s) for s in sizes)
    known = graph.initializers.get(name)
    if known is None:
        tensor = ir.Tensor(np.array(sizes, np.int64), name=name)
        known = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(ir.DataType.INT64))
        graph.initializers.add(known)
    return known
