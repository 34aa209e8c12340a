"""insert: the calls of a lowering enter the graph, in the name of the node whose place they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from torch import fx

from gatecc.ir.program import META, Program, origin
from gatecc.ir.trace import trace


def insert(
    program: Program, lowering: str, before: fx.Node, function: Callable[..., Any], *arguments: Any
) -> tuple[fx.Node, ...]:
    """``function(*arguments)``, traced to operators, in front of a node; the nodes of its results.

    Arguments that are nodes are tensors of the graph, others are constants. The new nodes have the owner, the call and
    the source line of ``before``.
    """
    traced, _ = trace(function, arguments)
    values = iter(a for a in arguments if isinstance(a, fx.Node))
    copied: dict[fx.Node, fx.Node] = {}
    for node in traced.nodes:
        if node.op == "placeholder":
            copied[node] = next(values)
        elif node.op == "output":
            return tuple(copied[result] for result in cast("tuple[fx.Node, ...]", node.args[0]))
        else:
            with program.graph.inserting_before(before):
                copy = program.graph.node_copy(node, copied.__getitem__)
            _mark(copy, node, before, lowering)
            copied[node] = copy
    raise AssertionError("a traced graph ends in an output")


def _mark(copy: fx.Node, source: fx.Node, place: fx.Node, lowering: str) -> None:
    copy.meta = {k: v for k, v in source.meta.items() if k in ("val", "tensor_meta")}
    copy.meta[META] = replace(origin(place), inserted_by=lowering)
    for key in ("nn_module_stack", "stack_trace"):
        if key in place.meta:
            copy.meta[key] = place.meta[key]
