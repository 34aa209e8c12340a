"""Masks: attention masks spelled out over the queries, as ONNX Runtime wants them.

Its Attention kernel broadcasts a mask over batch and heads, but takes a size of 1 along the queries for an error; in
torch a padding mask of shape (B, 1, 1, N) is usual.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_MASK = 3


def spell_out_masks(program: ExportedProgram) -> None:
    """Expand every mask (..., 1, N) of an attention with more queries than one. Values and gradients are the same."""
    graph = program.graph
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _ATTENTION:
            _spell_out(graph, node)
    program.graph_module.recompile()


def _spell_out(graph: fx.Graph, node: fx.Node) -> None:
    position = len(node.args) > _MASK
    mask = node.args[_MASK] if position else node.kwargs.get("attn_mask")
    query = node.args[0]
    if not isinstance(mask, fx.Node) or not isinstance(query, fx.Node):
        return
    held, queries = mask.meta["val"], query.meta["val"].shape[-2]
    if held.dim() < 2 or held.shape[-2] != 1 or (isinstance(queries, int) and queries == 1):
        return
    with graph.inserting_before(node):
        size = graph.call_function(torch.ops.aten.sym_size.int, (query, query.meta["val"].dim() - 2))
        size.meta["val"] = queries
        wide = graph.call_function(torch.ops.aten.expand.default, (mask, [*([-1] * (held.dim() - 2)), size, -1]))
        wide.meta["val"] = held.expand(*([-1] * (held.dim() - 2)), queries, -1)
    if position:
        node.update_arg(_MASK, wide)
    else:
        node.update_kwarg("attn_mask", wide)
