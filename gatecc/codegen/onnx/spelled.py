"""Spelled: forms of operators in ONNX's own syntax, for loops and for shapes that torch's tracing would settle.

A form asks for it with one symbolic node that holds the lines as text. They take the node's place in the graph that
torch.onnx has written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx_ir as ir

_DOMAIN, _NAME = "gatecc", "Spelled"


def spelled(
    lines: Sequence[str], inputs: Mapping[str, Tensor], outputs: Mapping[str, Sequence[Any]]
) -> Sequence[Tensor]:
    """The values that the lines assign to the names of ``outputs``, in their shapes, from those of ``inputs``.

    A line is a node of the standard, ``y = Add (x, y)``; a body of a loop or a branch is an attribute of its node. All
    inputs and outputs are float32.
    """
    read, given = (", ".join(f"float {name}" for name in names) for names in (inputs, outputs))
    return torch.onnx.ops.symbolic_multi_out(
        f"{_DOMAIN}::{_NAME}",
        list(inputs.values()),
        attrs={"text": f"form ({read}) => ({given}) {{ {' '.join(lines)} }}"},
        dtypes=[torch.float32] * len(outputs),
        shapes=list(outputs.values()),
        version=1,
    )


def spell_out(model: ir.Model, opset: int) -> None:
    """Put the lines of every such node in its place."""
    held: dict[tuple[Any, ...], ir.Value] = {}
    for node in list(model.graph.all_nodes()):
        if node.domain == _DOMAIN and node.op_type == _NAME:
            _put(model.graph, node, opset, held)


def _put(graph: ir.Graph, node: ir.Node, opset: int, held: dict[tuple[Any, ...], ir.Value]) -> None:
    assert node.graph is not None
    form = _parsed(node, opset)
    for value in _values(form):
        value.name = f"{node.name}.{value.name}"
    for inner, outer in zip(form.inputs, node.inputs, strict=True):
        inner.replace_all_uses_with(cast("ir.Value", outer))
    results = list(form.outputs)
    form.outputs.clear()
    for step in list(form):
        if step.op_type == "Constant":
            step.outputs[0].replace_all_uses_with(_constant(graph, step, held))
            continue
        form.remove(step)
        step.meta.update(node.meta)
        for part in _parts(step):
            for inside in part.all_nodes():
                inside.meta.update(node.meta)
        node.graph.insert_before(node, step)
    for old, new in zip(node.outputs, results, strict=True):
        name, new.shape, new.type = old.name, old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{name}_before", name
    node.graph.remove(node, safe=True)


def _parsed(node: ir.Node, opset: int) -> ir.Graph:
    """The lines as a graph, with a type and as much of a shape as follows for each of its values."""
    import onnx
    import onnx_ir as ir

    proto = onnx.parser.parse_graph(node.attributes["text"].as_string())
    for declared, value in zip((*proto.input, *proto.output), (*node.inputs, *node.outputs), strict=True):
        sizes = cast("ir.Value", value).shape
        assert sizes is not None
        known = [d if isinstance(d, int) else None for d in sizes]
        declared.CopyFrom(onnx.helper.make_tensor_value_info(declared.name, onnx.TensorProto.FLOAT, known))
    forget_shapes(proto)
    model = onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return ir.serde.deserialize_graph(onnx.shape_inference.infer_shapes(model, strict_mode=True).graph)


def forget_shapes(graph: Any) -> None:
    """``float x`` says that x has no axes; inside of a loop that is left to the inference of shapes."""
    for attribute in chain.from_iterable(node.attribute for node in graph.node):
        if attribute.HasField("g"):
            for end in (*attribute.g.input, *attribute.g.output):
                end.type.tensor_type.ClearField("shape")
            forget_shapes(attribute.g)


def _values(graph: ir.Graph) -> list[ir.Value]:
    """All that has a name in a graph and in the graphs inside of it, which share their names with what is around."""
    found = list(graph.inputs)
    for node in graph:
        found += node.outputs
        for part in _parts(node):
            found += _values(part)
    return found


def _parts(node: ir.Node) -> list[ir.Graph]:
    import onnx_ir as ir

    return [a.as_graph() for a in node.attributes.values() if a.type is ir.AttributeType.GRAPH]


def _constant(graph: ir.Graph, node: ir.Node, held: dict[tuple[Any, ...], ir.Value]) -> ir.Value:
    """An initializer with the constant's value, one for all that are equal."""
    import onnx_ir as ir

    tensor = node.attributes["value"].as_tensor()
    array = tensor.numpy()
    key = (array.dtype.str, array.shape, array.tobytes())
    if key not in held:
        name = f"constant_{len(held)}"
        while name in graph.initializers:
            name += "_"
        made = ir.Tensor(array, name=name)
        held[key] = ir.Value(name=name, const_value=made, shape=made.shape, type=ir.TensorType(made.dtype))
        graph.initializers.add(held[key])
    return held[key]
