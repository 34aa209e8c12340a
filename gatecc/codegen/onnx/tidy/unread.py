"""Unread: nodes and weights that nobody reads go, and so do the names of outputs that need not be computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_OPTIONAL = {  # outputs that a node may leave out
    "SkipLayerNormalization": (1, 2, 3),
    "SkipSimplifiedLayerNormalization": (1, 2, 3),
    "LayerNormalization": (1, 2),
    "GroupQueryAttention": (1, 2),
}


def drop_unread(model: ir.Model) -> None:
    """Remove what no output of the graph depends on."""
    graph = model.graph
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        if not graph.initializers[name].is_graph_input():
            del graph.initializers[name]
    for node in graph.all_nodes():
        for place in _OPTIONAL.get(node.op_type, ()):
            if (
                place < len(node.outputs)
                and not node.outputs[place].uses()
                and not node.outputs[place].is_graph_output()
            ):
                node.outputs[place].name = ""
