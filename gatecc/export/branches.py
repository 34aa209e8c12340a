"""Branches: which sides of an If no comparison has run, so that nothing is known of them.

A graph that exits early or routes runs one side for the values of the example, which a comparison repeats in its sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from gatecc.codegen.onnx.build import Graph
from gatecc.codegen.onnx.leaves import Call
from gatecc.codegen.onnx.runtime import Session
from gatecc.export.locate import without_functions

if TYPE_CHECKING:
    import onnx_ir as ir


_THEN, _ELSE = "then_branch", "else_branch"
_FILLS = frozenset("Identity Constant ConstantOfShape Shape Concat Expand Gather Slice Squeeze Unsqueeze Cast".split())


def untaken(call: Call, graph: Graph, path: Path, sizes: Sequence[Mapping[str, int]]) -> list[str]:
    """A note for each If of the file ``path`` of which a side that computes something runs at none of these sizes."""
    ifs = [(n, str(v.name)) for n in graph.model.graph if n.op_type == "If" and (v := n.inputs[0]) and v.producer()]
    if not ifs or not sizes:
        return []
    seen: dict[str, set[bool]] = {name: set() for _, name in ifs}
    with (
        without_functions(graph, path) as plain,
        closing(Session(plain, graph.places, apart=graph.apart, values=list(seen))) as session,
    ):
        for one in sizes:
            results = session.run(call.inputs, graph.dims.resized(call.leaves, one))
            for name, value in zip(session.names, results, strict=True):
                if name in seen:
                    seen[name].add(bool(value))
    notes = dict[str, None]()
    for node, name in ifs:
        for side, taken in ((_THEN, True), (_ELSE, False)):
            inside, other = node.attributes[side].as_graph(), _ELSE if taken else _THEN
            if taken not in seen[name] and _computes(inside):
                place = f"{side} {inside.name or ''} of {graph.places.get(node.name or '', node.name)}"
                notes[f"not compared: {place}: the inputs only take its {other}"] = None
    return list(notes)


def _computes(graph: ir.Graph) -> bool:
    """Whether a side does more than hand something on, or zeros."""
    return any(node.op_type not in _FILLS for node in graph)
