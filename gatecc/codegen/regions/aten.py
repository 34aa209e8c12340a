"""aten: a graph as a Python function of ATen operators, for any number of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from gatecc.codegen.regions.region import ALIASES, TRANSPOSES, RefusedError, name_of, shape

_SIZED = ("view", "_unsafe_view", "reshape", "expand", "full", "zeros", "ones")
_LEFT_OUT = ("device", "layout", "pin_memory", "memory_format")  # those of the operands hold


def print_aten(graph: fx.Graph, name: str, rows: tuple[int, ...], leader: fx.Node) -> str:
    """``def name(x0, ...)``. ``rows`` are the leading sizes at the time of printing, which ``leader`` has."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    body = [aten_line(n, rows) for n in graph.nodes if n.op == "call_function"]
    return print_function(f"def {name}({', '.join(n.name for n in inputs)}):", body, graph, leader)


def print_function(head: str, body: Sequence[str], graph: fx.Graph, leader: fx.Node) -> str:
    """A function of these lines that returns the results of a graph."""
    lines = [head]
    if any("*lead" in line or "lead[" in line for line in body):
        lines.append(f"    lead = {leader.name}.shape[:{len(shape(leader)) - 1}]")
    if any("device=device" in line for line in body):
        lines.append(f"    device = {leader.name}.device")
    results: Any = graph.output_node().args[0]
    outputs = ", ".join(_result(n, results[:i]) for i, n in enumerate(results))
    return "\n".join([*lines, *(f"    {line}" for line in body), f"    return ({outputs},)", ""])


def _result(node: fx.Node, before: Sequence[fx.Node]) -> str:
    """A result as a tensor of its own: an operator may not return one twice, a view of another, or of an input."""
    base = _viewed(node)
    own = base.op != "placeholder" and base not in map(_viewed, before)
    return node.name if own else f"{node.name}.clone()"


def _viewed(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and name_of(node) in (*ALIASES, *TRANSPOSES):
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return node


def aten_line(node: fx.Node, rows: tuple[int, ...]) -> str:
    """The line that computes a node."""
    return f"{node.name} = {_call(node, rows)}"


def _call(node: fx.Node, rows: tuple[int, ...]) -> str:
    name = name_of(node)
    if name == "getitem":
        return f"{node.args[0]}[{node.args[1]}]"
    arguments = [_written(a) for a in node.args]
    if name in _SIZED:
        at = 0 if name in ("full", "zeros", "ones") else 1
        arguments[at] = _sizes(node.args[at], rows)
    options = [f"{k}={_written(v)}" for k, v in node.kwargs.items() if k not in _LEFT_OUT and v is not None]
    if name in ("full", "zeros", "ones", "scalar_tensor", "arange"):
        options.append("device=device")
    return f"torch.ops.{node.target}({', '.join([*arguments, *options])})"


def _sizes(sizes: Any, rows: tuple[int, ...]) -> str:
    """Sizes of which the leading ones are those of the call."""
    if not all(isinstance(size, int) for size in sizes):
        raise RefusedError("sizes that are computed")
    found = list(sizes)
    if tuple(found[: len(rows)]) == rows and len(found) > len(rows) - (len(rows) > 1):
        return f"[{', '.join(['*lead', *map(str, found[len(rows) :])])}]"
    if found and found[0] == math.prod(rows):
        return f"[{', '.join(['-1', *map(str, found[1:])])}]"
    for axes in (len(found), len(found) - 1):  # the last leading axes, or 1 in their place; without or with columns
        own = [*rows][-axes:] if 0 < axes <= len(rows) and len(rows) > 1 else []
        if any(s > 1 for s in found[:axes]) and own and all(s in (1, n) for s, n in zip(found, own, strict=False)):
            first = len(rows) - axes
            sizes = [f"lead[{first + i}]" if s > 1 else "1" for i, s in enumerate(found[:axes])]
            return f"[{', '.join([*sizes, *map(str, found[axes:])])}]"
    return repr(found)


def _written(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, torch.dtype | bool | int | float | str) or value is None:
        return repr(value)
    raise RefusedError(f"an argument that cannot be written: {value!r}")
