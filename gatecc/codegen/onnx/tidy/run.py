"""tidy: the passes over an ONNX graph, in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gatecc.codegen.onnx.tidy.chains import shorten_chains
from gatecc.codegen.onnx.tidy.names import name_nodes
from gatecc.codegen.onnx.tidy.shapes import settle_shapes
from gatecc.codegen.onnx.tidy.unread import drop_unread
from gatecc.codegen.onnx.tidy.weights import fold_weights

if TYPE_CHECKING:
    import onnx_ir as ir


def tidy(model: ir.Model) -> None:
    """Bring the graph that torch.onnx wrote to as few nodes as it needs, in place."""
    settle_shapes(model)
    shorten_chains(model)
    fold_weights(model)
    drop_unread(model)
    name_nodes(model)
