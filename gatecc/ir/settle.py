"""settle: the markers of hooked calls leave a captured graph, and what they showed goes into its boundaries."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from gatecc.errors import CaptureError
from gatecc.ir.boundary import MARKER, Boundary
from gatecc.ir.program import Program


def settle(program: Program) -> None:
    """Take the markers of a captured and canonical program out, and fill in its boundaries.

    Raises CaptureError if a marker went into a region that stays a graph of its own.
    """
    if not program.boundaries:
        return
    found: dict[tuple[int, int], fx.Node] = {}
    for node in program.graph.nodes:
        if node.target is MARKER:
            found[cast("tuple[int, int]", tuple(node.args[1:3]))] = node
    for marker in found.values():
        if any(_reads_twice(user, marker) for user in marker.users):
            _keep(marker)
    _read(program, found)
    place: dict[fx.Node, int] = {}
    places: dict[int, int] = {}
    for node in program.graph.nodes:
        if node.target is MARKER:
            places[cast("int", node.args[1])] = len(place)
        else:
            place[node] = len(place)
    _place(program.boundaries, places)
    for marker in found.values():
        marker.replace_all_uses_with(cast("fx.Node", marker.args[0]))
        program.graph.erase_node(marker)
    program.captured = place


def _reads_twice(user: fx.Node, marker: fx.Node) -> bool:
    """Whether a node reads a value through a marker and in another way: without the marker these are the same."""
    if user.target is MARKER:
        return False
    value = _unmarked(marker)
    return any(node is not marker and _unmarked(node) is value for node in user.all_input_nodes)


def _keep(marker: fx.Node) -> None:
    """Let an alias follow a marker, so that the marked value is a node of its own."""
    with marker.graph.inserting_before(marker):
        alias = marker.graph.call_function(torch.ops.aten.alias.default, (marker.args[0],))
    alias.meta = dict(marker.meta)
    marker.update_arg(0, alias)


def _read(program: Program, found: dict[tuple[int, int], fx.Node]) -> None:
    sides = program.boundaries
    for side, boundary in enumerate(sides):
        for slot in range(boundary.slots):
            marker = found.get((side, slot))
            if marker is None:
                raise CaptureError(
                    "a hook is called in a region that stays a graph of its own",
                    where=program.full_name(boundary.path),
                    found="the submodule runs inside torch.autocast or torch.no_grad, or in a branch of torch.cond",
                    do="take the hook off for this call (handle.remove())",
                )
            boundary.values.append(_unmarked(marker))
            boundary.readers.append(
                {sides[cast("int", user.args[1])] if user.target is MARKER else user for user in marker.users}
            )


def _unmarked(node: fx.Node) -> fx.Node:
    while node.target is MARKER:
        node = cast("fx.Node", node.args[0])
    return node


def _place(sides: list[Boundary], places: dict[int, int]) -> None:
    """A call without tensors has no marker: it is entered as soon as the call before it was left."""
    now = 0
    for side, boundary in enumerate(sides):
        now = max(now, places.get(side, 0))
        boundary.place = now
