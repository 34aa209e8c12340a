"""marks: of which operator, and of which rewrite, a node of the ONNX graph is a part.

What torch.onnx writes of one operator are many nodes, and what it traces for that forgets who put the operator there.
Each node remembers by what names it went in earlier graphs, and so finds back to the one that knew.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.export import ExportedProgram

from gatecc.codegen.onnx.lower import GRAPH_LOWERINGS
from gatecc.codegen.onnx.place import operator
from gatecc.ir.program import origin

if TYPE_CHECKING:
    import onnx_ir as ir

OPERATOR, REWRITE = "gatecc.operator", "gatecc.rewrite"  # keys of the meta of ONNX nodes
WEIGHT = "gatecc.weight"  # of the meta of values that the model has as such


@dataclass(frozen=True)
class Mark:
    """``function`` names what the nodes are together, ``owner`` the module that they are in; nodes with equal marks
    belong to one place."""

    function: str
    owner: str
    place: tuple[Any, ...]


@dataclass(frozen=True)
class Marks:
    """Those of the nodes of one FX graph, by their names."""

    graph: int
    operators: Mapping[str, Mark]
    rewrites: Mapping[str, Mark]


def marks(program: ExportedProgram, operators: Collection[Any]) -> Marks:
    """What is known of the nodes before anything is put in its ONNX form. ``operators``: those that have one."""
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    made = [(n, origin(n)) for n in calls]
    return Marks(
        id(program.graph),
        {n.name: Mark(_named(operator(n)), at.owner, (n.name,)) for n, at in made if n.target in operators},
        {
            n.name: Mark(_identifier(at.inserted_by), at.owner, (at.inserted_by, at.call, at.line))
            for n, at in made
            if at.inserted_by and at.inserted_by not in GRAPH_LOWERINGS
        },
    )


def mark(model: ir.Model, known: Marks) -> None:
    """Enter the marks in the meta of the nodes that torch.onnx wrote."""
    for node in model.graph.all_nodes():
        source = node.meta.get("node")
        name = _earlier(source, known.graph) if isinstance(source, fx.Node) else None
        for key, of in ((OPERATOR, known.operators), (REWRITE, known.rewrites)):
            if name is not None and name in of:
                node.meta[key] = of[name]


def _earlier(node: fx.Node, graph: int) -> str | None:
    """The name of a node in an earlier graph."""
    sources: Any = node.meta.get("from_node")
    while sources:
        if sources[-1].graph_id == graph:
            return sources[-1].name
        sources = sources[-1].from_node
    return None


def _named(name: str) -> str:
    return _identifier(name.rpartition(".")[2])


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
