"""Attention that hides in the body of a higher-order operator: refused by name, for the matchers do not look inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.node import map_arg

from gatecc.ir.ops import CONTRACTIONS, SOFTMAXES, opname
from gatecc.ir.program import Program
from gatecc.ir.refusals import refuse
from gatecc.ir.site import Refusal

_OWN = frozenset(("aten", "prims", "prim", "gatecc", "higher_order", "_operator"))


def match_hidden(program: Program) -> Iterator[Refusal]:
    """One refusal for every operator whose body computes attention (GCC185) or other products (GCC186)."""
    for node in program.calls():
        if isinstance(node.target, HigherOrderOperator) and node.target.name() != "flex_attention":
            inside = {opname(n) for body in _bodies(program.graph_module, node) for n in body.graph.nodes}
            name = f"inside {node.target.name()}"
            if inside & (SOFTMAXES | {"scaled_dot_product_attention"}):
                yield refuse("GCC185", "attention", node, name)
            elif inside & CONTRACTIONS:
                yield refuse("GCC186", "linear", node, name)
        elif isinstance(node.target, OpOverload) and node.target.namespace not in _OWN and _attends(node.target):
            yield refuse("GCC105", "attention", node, node.target.name())


def _attends(target: OpOverload) -> bool:
    name = target.name().lower()
    return "attention" in name or "attn" in name


def _bodies(holder: fx.GraphModule, node: fx.Node) -> Iterator[fx.GraphModule]:
    """The bodies that a higher-order operator is given, and those inside them."""
    given: list[fx.Node] = []
    map_arg((node.args, node.kwargs), given.append)
    for source in given:
        body: Any = getattr(holder, str(source.target), None) if source.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            yield body
            for inner in body.graph.nodes:
                if isinstance(inner.target, HigherOrderOperator):
                    yield from _bodies(body, inner)
