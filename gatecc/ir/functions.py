"""Calls of custom autograd functions: where they are in a graph, so that a variant calls them and gets their gradients.

A graph holds the operators of a function's forward. Their own gradients are not those that the function's author wrote:
straight-through estimators, reversed or clipped gradients, fake quantisation. So the operators stay in the graph for
whoever matches and edits it, and a variant is printed with a call of the function in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import fx

from gatecc.errors import CaptureError
from gatecc.ir.boundary import MARKER, Slot

_ALIAS = torch.ops.aten.alias.default


@dataclass(eq=False)
class FunctionCall:
    """``cls.apply(*arguments)``: slots are tensors and sizes, other arguments are constants; so are the ``results``,
    which come in a tuple if there are ``several``.

    ``entries`` are the nodes of the slots that go in, aliases of what the caller gives; ``inside`` the operators of the
    forward, ``sources`` what they read besides; ``outputs`` the nodes of the slots that come out.
    """

    cls: Any
    arguments: tuple[Any, ...] = ()
    results: tuple[Any, ...] = ()
    several: bool = False
    entries: list[fx.Node | None] = field(default_factory=list["fx.Node | None"])
    inside: set[fx.Node] = field(default_factory=set[fx.Node])
    sources: set[fx.Node] = field(default_factory=set[fx.Node])
    outputs: list[fx.Node | None] = field(default_factory=list["fx.Node | None"])

    def function(self) -> Callable[..., Any]:
        """The call as a function of its slots."""
        cls, arguments = self.cls, self.arguments

        def call(*slots: Any) -> Any:
            return cls.apply(*[slots[a.number] if isinstance(a, Slot) else a for a in arguments])

        call.__name__ = call.__qualname__ = cls.__name__
        return call


def sides(number: int) -> tuple[int, int]:
    """What markers say of the call with this number: of what goes in, and of what comes out. Below those of hooks."""
    return -1 - 2 * number, -2 - 2 * number


def settle_functions(graph_module: fx.GraphModule, calls: list[FunctionCall]) -> list[FunctionCall]:
    """Take the markers of calls out of a captured graph; the calls that it holds, with their nodes.

    Those in regions without gradients are left as operators. Raises CaptureError for those in other regions that have a
    graph of their own.
    """
    if not calls:
        return []
    _settle_regions(graph_module)
    of_side = {side: call for number, call in enumerate(calls) for side in sides(number)}
    markers = _markers(graph_module.graph)
    found = {of_side[cast("int", m.args[1])] for m in markers}
    for call in found:
        call.entries = [None] * _slots(call.arguments)
        call.outputs = [None] * _slots(call.results)
    _read(graph_module.graph, of_side)
    for marker in markers:
        _place(of_side[cast("int", marker.args[1])], marker)
    for call in found:
        _name_sizes(graph_module.graph, call)
    return [call for call in calls if call in found]


def _settle_regions(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        body = getattr(graph_module, str(node.target), None) if node.op == "get_attr" else None
        if not isinstance(body, fx.GraphModule):
            continue
        free = all(str(user.target) == "wrap_with_set_grad_enabled" and user.args[0] is False for user in node.users)
        if not free and any(_markers(m.graph) for m in body.modules() if isinstance(m, fx.GraphModule)):
            raise CaptureError(
                "a custom autograd function is called in a region that has a graph of its own",
                found="it runs inside torch.autocast, or in a branch of torch.cond",
                do="call it outside of the region",
            )
        for inner in [m for m in body.modules() if isinstance(m, fx.GraphModule)]:
            for marker in _markers(inner.graph):
                _erase(marker, cast("fx.Node", marker.args[0]))
            inner.recompile()


def _markers(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is MARKER and cast("int", n.args[1]) < 0]


def _slots(values: tuple[Any, ...]) -> int:
    return sum(isinstance(v, Slot) for v in values)


def _read(graph: fx.Graph, of_side: Mapping[int, FunctionCall]) -> None:
    """Which nodes lie between what goes into a call and what comes out of it."""
    now: FunctionCall | None = None
    last = {of_side[cast("int", m.args[1])]: m for m in _markers(graph)}
    for node in graph.nodes:
        if node.target is MARKER and cast("int", node.args[1]) < 0:
            now = of_side[cast("int", node.args[1])]
            now = None if last[now] is node else now
        elif now is not None and node.op == "call_function":
            now.inside.add(node)


def _name_sizes(graph: fx.Graph, call: FunctionCall) -> None:
    """Let sizes among the arguments be read in the graph."""
    arguments = list(call.arguments)
    for i, value in enumerate(arguments):
        if isinstance(value, torch.SymInt):
            arguments[i] = Slot(len(call.entries))
            call.entries.append(_size(graph, value, call))
    call.arguments = tuple(arguments)


def _size(graph: fx.Graph, value: torch.SymInt, call: FunctionCall) -> fx.Node:
    """A node that holds a size: one that is there before the call, or the size of an input."""
    for node in graph.nodes:
        held = node.meta.get("val")
        if isinstance(held, torch.SymInt) and held.node.expr == value.node.expr:
            return node
        if node in call.entries:
            break
    inputs = graph.find_nodes(op="placeholder")
    for node in inputs:
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr == value.node.expr:
                with graph.inserting_after(inputs[-1]):
                    made = graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
                made.meta = {"val": size}
                return made
    raise CaptureError(
        "a custom autograd function takes a size that is none of an input",
        where=call.cls.__qualname__,
        found=str(value.node.expr),
        do="let it take the tensor, and read the size there",
    )


def _place(call: FunctionCall, marker: fx.Node) -> None:
    side, slot, value = cast("int", marker.args[1]), cast("int", marker.args[2]), cast("fx.Node", marker.args[0])
    if side % 2:
        marker.target, marker.args = _ALIAS, (value,)
        call.entries[slot] = marker
    elif value in call.inside and value not in call.outputs:
        call.outputs[slot] = value
        _erase(marker, value)
    else:  # what went in comes out as it is
        marker.target, marker.args = _ALIAS, (value,)
        call.outputs[slot] = marker
    call.sources = {source for node in call.inside for source in node.all_input_nodes} - call.inside


def _erase(marker: fx.Node, value: fx.Node) -> None:
    marker.replace_all_uses_with(value)
    marker.graph.erase_node(marker)


def copies_of(calls: Collection[FunctionCall], nodes: Mapping[fx.Node, fx.Node]) -> list[FunctionCall]:
    """The calls of a program as those of its copy."""

    def mine(old: Collection[fx.Node | None]) -> list[fx.Node | None]:
        return [nodes.get(node) if node is not None else None for node in old]

    made: list[FunctionCall] = []
    for call in calls:
        inside, sources = ({node for node in mine(old) if node is not None} for old in (call.inside, call.sources))
        made.append(
            replace(call, entries=mine(call.entries), inside=inside, sources=sources, outputs=mine(call.outputs))
        )
    return made


def entries(calls: Collection[FunctionCall]) -> set[fx.Node]:
    """The nodes that calls take: they stay, whether or not an operator of the forward reads them."""
    return {node for call in calls for node in call.entries if node is not None}
