"""Scalars: numbers that stand where an operator takes a tensor, made tensors.

A capture writes ``5 - x`` as ``sub.Tensor(5, x)``; torch.onnx finds no overload of ``aten.sub`` for that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram


def scalars_as_tensors(program: ExportedProgram) -> None:
    """Give every such number a node, of the dtype that torch's type promotion lets it have."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in list(module.graph.nodes):
                _with_tensors(module.graph, node)
            module.recompile()


def _with_tensors(graph: fx.Graph, node: fx.Node) -> None:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return
    for place, (argument, value) in enumerate(zip(schema.arguments, node.args, strict=False)):
        if isinstance(value, int | float) and isinstance(argument.type, torch.TensorType):
            node.update_arg(place, _tensor(graph, node, value))


def _tensor(graph: fx.Graph, node: fx.Node, value: float) -> fx.Node:
    others: list[Any] = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    dtype = torch.result_type(others[0], value) if others else torch.get_default_dtype()
    device = others[0].device if others else torch.device("cpu")
    with graph.inserting_before(node):
        made = graph.call_function(torch.ops.aten.scalar_tensor.default, (value,), {"dtype": dtype, "device": device})
    mode = getattr(others[0], "fake_mode", None) if others else None
    if mode is None:
        made.meta["val"] = torch.scalar_tensor(value, dtype=dtype, device=device)
    else:
        with mode:
            made.meta["val"] = torch.scalar_tensor(value, dtype=dtype, device=device)
    return made
