"""Chains: a reshape of a reshape is one, a transpose of a transpose too, and those that change nothing go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gatecc.codegen.onnx.tidy.shapes import reshaped
from gatecc.codegen.onnx.tidy.weights import constant

if TYPE_CHECKING:
    import onnx_ir as ir


def shorten_chains(model: ir.Model) -> None:
    """Let the readers of Identity, Reshape and Transpose read the earliest value from which one node makes theirs."""
    for graph in model.graphs():
        for node in list(graph):
            if not node.domain and node.op_type in _SHORTENED:
                _SHORTENED[node.op_type](model.graph, node)


def _identity(graph: ir.Graph, node: ir.Node) -> None:
    _drop(node)


def _reshape(graph: ir.Graph, node: ir.Node) -> None:
    """Reshape(Reshape(x)) -> Reshape(x), if the sizes that stay say all; of x in its own shape -> x."""
    source, out = node.inputs[0], node.outputs[0]
    before = _made_by(source, "Reshape")
    if constant(node.inputs[1]) is None:
        return
    if before is not None and before.inputs[0] is not None:
        shape = reshaped(graph, before.inputs[0], out)
        if shape is not None:
            node.replace_input_with(0, before.inputs[0])
            node.replace_input_with(1, shape)
            node.attributes.pop("allowzero", None)
    sizes = _sizes(node.inputs[0])
    if sizes is not None and sizes == _sizes(out):
        _drop(node)


def _transpose(graph: ir.Graph, node: ir.Node) -> None:
    """Transpose(Transpose(x)) -> Transpose(x) or x."""
    before = _made_by(node.inputs[0], "Transpose")
    order = _order(node)
    if before is not None and order is not None and (first := _order(before)) is not None:
        import onnx_ir as ir

        order = [first[i] for i in order]
        node.replace_input_with(0, before.inputs[0])
        node.attributes["perm"] = ir.AttrInt64s("perm", order)
    if order is not None and order == sorted(order):
        _drop(node)


_SHORTENED: dict[str, Any] = {"Identity": _identity, "Reshape": _reshape, "Transpose": _transpose}


def _drop(node: ir.Node) -> None:
    """Let who reads the result of a node read its first input. An output of the graph is a value of its own."""
    source, out = node.inputs[0], node.outputs[0]
    if source is None:
        return
    ends = out.is_graph_output()
    if not ends or (source.producer() is not None and not source.is_graph_output() and source.graph is out.graph):
        out.replace_all_uses_with(source, replace_graph_outputs=ends)


def _made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and (node.domain, node.op_type) == ("", kind) else None


def _order(node: ir.Node) -> Sequence[int] | None:
    perm = node.attributes.get("perm")
    return None if perm is None else list(perm.as_ints())


def _sizes(value: ir.Value | None) -> list[Any] | None:
    """The shape of a value, numbers and names; None if a size has neither."""
    if value is None or value.shape is None:
        return None
    sizes = [d if isinstance(d, int) else d.value for d in value.shape]
    return None if None in sizes else sizes
