"""Printer: a graph as compact text, one node per line, for golden cases and documentation.

    %x = input                                  # b n 8
    @gate.weight                                # 1 8
    %score = linear(%x, @gate.weight, None)     # b n 1
    return %score

Operators are ATen's without the prefix, with the overload unless it is the default (``add.Tensor``). Behind the ``#``
stand the size, the dtype unless it is float32, and after a bar the owner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from gatecc.ir.program import Program, fake, origin
from gatecc.ir.sizes import shape_text, size_names


def graph_text(
    graph: Program | fx.Graph,
    *,
    sizes: Mapping[str, str] | None = None,
    owners: bool = True,
    keep: Callable[[fx.Node], bool] | None = None,
) -> str:
    """The text of a graph. ``sizes`` names symbolic sizes ({"s77": "n"}), by default
    after the axes of the inputs; ``keep`` picks the nodes that are shown."""
    nodes = [n for n in (graph.graph if isinstance(graph, Program) else graph).nodes if keep is None or keep(n)]
    names = sizes or (size_names(nodes[0].graph) if nodes else {})
    rows = [(node_text(node), _comment(node, names, owners)) for node in nodes]
    width = max((len(code) for code, comment in rows if comment), default=0)
    return "\n".join(f"{code:<{width}}  # {comment}" if comment else code for code, comment in rows)


def node_text(node: fx.Node) -> str:
    """One node without its comment: ``%y = add.Tensor(%x, 1)``."""
    if node.op == "output":
        values = node.args[0] if isinstance(node.args[0], tuple | list) else node.args
        return "return " + ", ".join(map(_value, values))
    if node.op == "get_attr":
        return f"@{node.target}"
    if node.op == "placeholder":
        return f"%{node.name} = input"
    arguments = [*map(_value, node.args), *(f"{key}={_value(value)}" for key, value in node.kwargs.items())]
    return f"%{node.name} = {operator_name(node.target)}({', '.join(arguments)})"


def operator_name(target: Any) -> str:
    """``linear``, ``add.Tensor``, ``gatecc.inject_bce``, ``getitem``."""
    if not isinstance(target, torch._ops.OpOverload):
        return str(getattr(target, "__name__", target))
    namespace, name = target._schema.name.split("::")
    overload = "" if target._overloadname == "default" else f".{target._overloadname}"
    return ("" if namespace == "aten" else f"{namespace}.") + name + overload


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, torch.dtype | torch.device | torch.memory_format | torch.layout):
        return str(value).removeprefix("torch.")
    return repr(value)


def _comment(node: fx.Node, names: Mapping[str, str], owners: bool) -> str:
    held = fake(node)
    if held is None or node.op == "output":
        return ""
    dtype = "" if held.dtype is torch.float32 else f" {str(held.dtype).removeprefix('torch.')}"
    size = shape_text(held.shape, names)
    owner = origin(node).owner if owners and node.op == "call_function" else ""
    return size + dtype + (f" | {owner}" if owner else "")


def window(node: fx.Node, radius: int = 4) -> str:
    """The graph around a node as text, the node marked: what errors print."""
    nodes = [n for n in node.graph.nodes if n.op != "get_attr" or n is node]  # their readers show them
    at = nodes.index(node)
    near = nodes[max(0, at - radius) : at + radius + 1]
    rows = graph_text(node.graph, keep=set(near).__contains__, owners=False).splitlines()
    return "\n".join(("> " if n is node else "  ") + row for n, row in zip(near, rows, strict=True))
