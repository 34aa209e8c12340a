"""Branches: values that are needed on a condition only, computed inside of an ``If``, so that they cost nothing else.

Forms of operators ask for it with one symbolic node. Once the graph is written, what such a value alone is computed
from moves into the branch; what others read as well, inputs and weights stay outside, where branches may read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx_ir as ir

_DOMAIN, _NAME = "gatecc", "OnlyIf"


def branch(x: Tensor, otherwise: Tensor, condition: Tensor, label: str) -> Tensor:
    """The node: x if the condition () holds, else ``otherwise``; nodes of one label and condition become one If."""
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{_NAME}",
        [x, otherwise, condition],
        attrs={"label": label},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


def put_in_branches(graph: ir.Graph) -> None:
    """Put an If in the place of all such nodes of one label and condition."""
    found: dict[tuple[str, int], list[ir.Node]] = {}
    for node in graph:
        if node.domain == _DOMAIN and node.op_type == _NAME:
            found.setdefault((node.attributes["label"].as_string(), id(node.inputs[2])), []).append(node)
    for (label, _), nodes in found.items():
        _put(graph, label, nodes)
    if found:
        graph.sort()


def _put(graph: ir.Graph, label: str, nodes: Sequence[ir.Node]) -> None:
    import onnx_ir as ir

    condition = nodes[0].inputs[2]
    outputs = [node.outputs[0] for node in nodes]
    kept = {id(value) for value in graph.outputs}
    then, other = (_branch(graph, nodes, at, kept, name) for at, name in ((0, f"{label}_then"), (1, f"{label}_else")))
    made = ir.node(
        "If",
        [condition],
        {"then_branch": then, "else_branch": other},
        num_outputs=len(nodes),
        name=f"if_{label}",
    )
    made.meta.update(nodes[0].meta)
    graph.insert_after(nodes[-1], made)
    for old, new in zip(outputs, made.outputs, strict=True):
        name, new.shape, new.type = old.name, old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name = name
    for node in nodes:
        graph.remove(node, safe=True)


def _branch(graph: ir.Graph, nodes: Sequence[ir.Node], at: int, kept: set[int], name: str) -> ir.Graph:
    """A graph of what the operands number ``at`` alone are computed from; the operands become its outputs."""
    import onnx_ir as ir

    alone = _alone(graph, nodes, at, kept)
    inside = {id(node) for node in alone}
    results: list[ir.Value] = []
    more: list[ir.Node] = []
    for number, node in enumerate(nodes):
        value = cast("ir.Value", node.inputs[at])
        node.replace_input_with(at, None)
        if id(value.producer()) not in inside or any(value is r for r in results):  # a branch yields its own values
            copy = ir.node("Identity", [value], name=f"{name}_{number}")
            copy.outputs[0].name = f"{name}_{number}"
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            more.append(copy)
            value = copy.outputs[0]
        results.append(value)
    graph.remove(alone)
    return ir.Graph([], results, nodes=[*alone, *more], name=name)


def _alone(graph: ir.Graph, nodes: Sequence[ir.Node], at: int, kept: set[int]) -> list[ir.Node]:
    """The nodes, in order, whose results nobody reads but each other and the operands ``at`` of ``nodes``."""
    inside: set[int] = set()
    readers = {id(node) for node in nodes}
    around = {id(n): id(node) for node in graph for part in _parts(node) for n in part.all_nodes()}
    found: list[ir.Node] = []
    for node in reversed(list(graph)):
        uses = [use for value in node.outputs for use in value.uses()]
        if not uses or any(id(value) in kept for value in node.outputs):
            continue
        if all(around.get(id(n), id(n)) in inside or (id(n) in readers and i == at) for n, i in uses):
            inside.add(id(node))
            found.append(node)
    return found[::-1]


def _parts(node: ir.Node) -> list[ir.Graph]:
    """The branches of a node."""
    import onnx_ir as ir

    held = node.attributes.values()
    return [a.as_graph() for a in held if a.type is ir.AttributeType.GRAPH]
