"""Indices: numbers of rows as int64, the only kind that ONNX gathers several axes by."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx
from torch.export import ExportedProgram

aten: Any = torch.ops.aten
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)


def long_indices(program: ExportedProgram) -> None:
    """Cast the integers of 32 bits that a tensor is indexed by. torch takes them, ONNX's GatherND does not."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in list(module.graph.nodes):
                if node.target in _INDEXING:
                    _cast(node)
            module.recompile()


def _cast(node: fx.Node) -> None:
    indices: list[Any] = list(cast("list[Any]", node.args[1]))
    for at, index in enumerate(indices):
        held = index.meta.get("val") if isinstance(index, fx.Node) else None
        if isinstance(held, torch.Tensor) and held.dtype == torch.int32:
            with node.graph.inserting_before(node):
                indices[at] = node.graph.call_function(aten.to.dtype, (index, torch.int64))
            indices[at].meta = {**node.meta, "val": held.to(torch.int64)}
    node.update_arg(1, indices)
