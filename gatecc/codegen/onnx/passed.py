"""Passed states: inputs of a graph that leave it as they came, for runtimes that count on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def pass_on(model: ir.Model, past: str, present: str, shape: Sequence[int | str], dtype: str) -> None:
    """Add the input ``past`` and the output ``present``, which is the same."""
    import onnx_ir as ir

    graph = model.graph
    kind = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}[dtype]
    given = ir.Value(name=past, shape=ir.Shape(shape), type=ir.TensorType(kind))
    node = ir.node("Identity", [given], name=f"{present}.passed")
    made = node.outputs[0]
    made.name, made.shape, made.dtype = present, ir.Shape(shape), kind
    graph.inputs.append(given)
    graph.append(node)
    graph.outputs.append(made)
