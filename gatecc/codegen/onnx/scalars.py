"""Scalars: numbers that stand where an operator takes a tensor, made tensors.

A capture writes ``5 - x`` as ``sub.Tensor(5, x)``; torch.onnx finds no overload of ``aten.sub`` for that. In float64
graphs it would write numbers with the precision of float32.
"""

from __future__ import annotations

import math
import struct
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

aten: Any = torch.ops.aten
_LONGEST = 3  # 3 times 24 bits are more than 53


def scalars_as_tensors(program: ExportedProgram, *, float64: bool) -> None:
    """Give a number that stands first, or (with ``float64``) is of that dtype, a node of its own.

    Its dtype is the one that torch's type promotion gives it.
    """
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in list(module.graph.nodes):
                _with_tensors(module.graph, node, float64)
            module.recompile()


def _with_tensors(graph: fx.Graph, node: fx.Node, float64: bool) -> None:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return
    result = node.meta.get("val")
    wide = float64 and isinstance(result, torch.Tensor) and result.dtype == torch.float64
    for place, (argument, value) in enumerate(zip(schema.arguments, node.args, strict=False)):
        if not isinstance(value, int | float) or not isinstance(argument.type, torch.TensorType):
            continue
        if place == 0 or (wide and isinstance(value, float) and _float32(value) != value):
            node.update_arg(place, _tensor(graph, node, value))


def _tensor(graph: fx.Graph, node: fx.Node, value: float) -> fx.Node:
    others: list[Any] = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    dtype = torch.result_type(others[0], value) if others else torch.get_default_dtype()
    device = others[0].device if others else torch.device("cpu")
    mode = getattr(others[0], "fake_mode", None) if others else None
    parts: list[fx.Node] = []
    with graph.inserting_before(node), mode or nullcontext():
        for part in _parts(value, dtype):
            made = graph.call_function(aten.scalar_tensor.default, (part,), {"dtype": dtype, "device": device})
            made.meta["val"] = torch.scalar_tensor(part, dtype=dtype, device=device)
            parts.append(made)
        total = parts[0]
        for made in parts[1:]:
            total = graph.call_function(aten.add.Tensor, (total, made))
            total.meta["val"] = made.meta["val"].clone()
    return total


def scalar(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A number as a tensor without axes, in a form that torch.onnx writes exactly."""
    first, *others = (torch.scalar_tensor(part, dtype=dtype, device=device) for part in _parts(value, dtype))
    for other in others:
        first = first + other
    return first


def _float32(value: float) -> float:
    """The nearest number of float32; 0 for what is beyond it."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return 0.0


def _parts(value: float, dtype: torch.dtype) -> list[float]:
    """Numbers of float32 whose sum is a number of float64: torch.onnx writes constants in float32, and casts them."""
    if dtype != torch.float64 or not isinstance(value, float) or not math.isfinite(value):
        return [value]
    parts: list[float] = []
    while value and len(parts) < _LONGEST:
        part = _float32(value)
        if not part:
            break
        parts.append(part)
        value -= part
    return parts or [0.0]
