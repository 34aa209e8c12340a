"""A captured graph for other tools: a networkx DiGraph, a GraphML file, a dot file.

Nodes carry op, target, owner, shape, dtype, line and inserted_by as strings; an edge carries the positions at which the
consumer takes the value, such as "0" or "0,1" for ``x * x`` and "key" for keyword arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import networkx as nx
from torch import fx
from torch.fx.node import map_arg

from gatecc.ir.files import write_atomic
from gatecc.ir.program import Program, fake, origin
from gatecc.ir.sizes import shape_text, size_names

ATTRIBUTES = ("op", "target", "owner", "shape", "dtype", "line", "inserted_by")  # of a node, all of them text


def to_networkx(graph: Program | fx.Graph) -> nx.DiGraph[str]:
    """The graph as a DiGraph over node names, in execution order."""
    result: nx.DiGraph[str] = nx.DiGraph()
    graph = graph.graph if isinstance(graph, Program) else graph
    sizes = size_names(graph)
    for node in graph.nodes:
        result.add_node(node.name, **attributes(node, sizes))
        for source, position in uses(node).items():
            result.add_edge(source, node.name, position=position)
    return result


def attributes(node: fx.Node, sizes: Mapping[str, str]) -> dict[str, str]:
    """What is known of a node, as text; empty where nothing is. ``sizes`` names symbolic sizes."""
    place, value = origin(node), fake(node)
    return {
        "op": node.op,
        "target": target_name(node.target),
        "owner": place.owner,
        "shape": "" if value is None else shape_text(value.shape, sizes),
        "dtype": "" if value is None else str(value.dtype).removeprefix("torch."),
        "line": place.line,
        "inserted_by": place.inserted_by,
    }


def target_name(target: str | Callable[..., Any]) -> str:
    """``aten.linear.default``, ``operator.getitem``, ``layer.weight``."""
    if isinstance(target, str):
        return target
    text = str(target)
    if not text.startswith("<"):
        return text
    module = (getattr(target, "__module__", "") or "").lstrip("_")
    return f"{module}.{getattr(target, '__name__', type(target).__name__)}".lstrip(".")


def write_graphml(graph: Program | fx.Graph | nx.DiGraph[str], path: str | os.PathLike[str]) -> Path:
    """Write GraphML (yEd, Gephi, Cytoscape, ``networkx.read_graphml``)."""
    return write_atomic(path, "\n".join(nx.generate_graphml(_digraph(graph))) + "\n")


def write_dot(graph: Program | fx.Graph | nx.DiGraph[str], path: str | os.PathLike[str]) -> Path:
    """Write Graphviz dot, one cluster per owner; Graphviz itself is not needed to write it."""
    return write_atomic(path, "\n".join(_dot(_digraph(graph))) + "\n")


def _digraph(graph: Program | fx.Graph | nx.DiGraph[str]) -> nx.DiGraph[str]:
    return graph if isinstance(graph, nx.DiGraph) else to_networkx(graph)


def uses(node: fx.Node) -> dict[str, str]:
    """The names of a node's inputs, and where it takes them: ``{"x": "0,1"}``."""
    places: dict[str, list[str]] = {}
    for position, argument in (*enumerate(node.args), *node.kwargs.items()):
        map_arg(argument, lambda source, at=str(position): places.setdefault(source.name, []).append(at))
    return {name: ",".join(positions) for name, positions in places.items()}


_STYLE = {"placeholder": "shape=ellipse", "output": "shape=ellipse", "get_attr": "shape=note"}


def _dot(graph: nx.DiGraph[str]) -> Iterator[str]:
    yield "digraph gatecc {"
    yield '  node [shape=box, style="rounded,filled", fillcolor=white, fontname="sans-serif", fontsize=10];'
    owners: dict[str, list[str]] = {}
    for name in graph:
        owners.setdefault(graph.nodes[name]["owner"], []).append(name)
    for i, (owner, names) in enumerate(owners.items()):
        yield f"  subgraph cluster_{i} {{ label={_quote(owner or '(model)')}; color=gray;"
        yield from (f"    {_quote(name)} [{_look(name, graph.nodes[name])}];" for name in names)
        yield "  }"
    for source, target, position in graph.edges(data="position"):
        yield f"  {_quote(source)} -> {_quote(target)} [tooltip={_quote(position)}];"
    yield "}"


def _look(name: str, data: dict[str, str]) -> str:
    lines = (name, data["target"], " ".join((data["dtype"], data["shape"])).strip(), data["line"])
    looks = [f"label={_quote(chr(10).join(line for line in lines if line))}"]
    looks += [_STYLE[data["op"]]] if data["op"] in _STYLE else []
    looks += ["fillcolor=palegreen"] if data["inserted_by"] else []
    return ", ".join(looks)


def _quote(text: str) -> str:
    """A dot string. Graphviz reads backslashes as escapes in labels, so they are doubled; a line break is ``\\n``."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
