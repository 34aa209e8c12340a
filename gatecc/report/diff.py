"""What changed between two graphs: one union graph with a state per node, cut down to the region worth looking at."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from typing import Literal

import networkx as nx

from gatecc.report.rows import GraphDump, GraphPair, NodeRow

State = Literal["same", "added", "removed", "rewired", "fold"]
Edge = tuple[str, str]

LARGE = 70  # boxes; a drawing with more is cut down to the neighbourhood of the change
RADII = (4, 3, 2, 1, 0)  # tried in this order until the first changed region is small enough
HUB = 8  # a node with more neighbours (a mask, a rotary table) does not make them near to each other
_SIZES = re.compile(r"aten\.(sym_|_assert)|operator\.(?!getitem)|math\.|torch\.sym_")  # no tensors, so not drawn


@dataclass(frozen=True)
class Box:
    """A drawn node, or a run of nodes folded into one (state "fold"). ``weights`` are its parameters' names."""

    name: str
    row: NodeRow
    state: State = "same"
    weights: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diff:
    """The union of both graphs in execution order; ``before`` and ``after`` are the edges of each."""

    boxes: dict[str, Box]
    before: frozenset[Edge]
    after: frozenset[Edge]
    omitted: int = 0  # changed nodes that are not drawn, since they are many

    @property
    def edges(self) -> frozenset[Edge]:
        return self.before | self.after

    @property
    def changed(self) -> list[Box]:
        return [box for box in self.boxes.values() if box.state in ("added", "removed", "rewired")]

    def graph(self) -> nx.DiGraph[str]:
        """The union as a DiGraph over box names."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(self.boxes)
        graph.add_edges_from(sorted(self.edges))
        return graph


def diffs(pair: GraphPair) -> list[Diff]:
    """Compare the two graphs of a pair by node name; without an ``after`` nothing has changed.

    One union, so that every node has one place in both drawings; two parts if nodes have changed their order so much
    that the union has a cycle.
    """
    before = _Side(pair.before)
    after = before if pair.after is None else _Side(pair.after)
    boxes = {name: _box(name, before, after) for name in _merged(before, after)}
    union = Diff(boxes, before.edges, after.edges)
    if nx.is_directed_acyclic_graph(union.graph()):
        return [_sorted(union)]
    only = [{name: box for name, box in boxes.items() if name in side.rows} for side in (before, after)]
    return [
        _sorted(Diff(only[0], before.edges, frozenset())),
        _sorted(Diff(only[1], frozenset(), after.edges)),
    ]


def region(whole: Diff) -> Diff:
    """The part to draw: the change with its neighbourhood, everything else folded; small graphs stay whole."""
    if len(whole.boxes) <= LARGE:
        return whole
    if not whole.changed:
        return _fold_by_owner(whole)
    shown = _shown(whole)
    omitted = sum(box.name not in shown for box in whole.changed)
    return replace(_fold(whole, _runs_outside(whole, shown)), omitted=omitted)


@dataclass
class _Side:
    """One graph without its parameters and sizes: parameters are written into the boxes that read them."""

    dump: GraphDump
    rows: dict[str, NodeRow] = field(init=False)
    weights: dict[str, tuple[str, ...]] = field(init=False)
    inputs: dict[str, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        parameters = {row.name: row for row in self.dump.nodes if row.op == "get_attr"}
        self.rows = {r.name: r for r in self.dump.nodes if r.op != "get_attr" and not _SIZES.match(r.target)}
        self.weights = {
            name: tuple(parameters[i].target for i in row.inputs if i in parameters) for name, row in self.rows.items()
        }
        self.inputs = {name: tuple(i for i in row.inputs if i in self.rows) for name, row in self.rows.items()}

    @property
    def edges(self) -> frozenset[Edge]:
        """From earlier to later nodes: a report read from a file may hold any text, but no cycle comes of it."""
        place = {name: i for i, name in enumerate(self.rows)}
        pairs = ((source, name) for name, inputs in self.inputs.items() for source in inputs)
        return frozenset((source, name) for source, name in pairs if place[source] < place[name])


def _box(name: str, before: _Side, after: _Side) -> Box:
    if name not in before.rows:
        return Box(name, after.rows[name], "added", after.weights[name])
    if name not in after.rows:
        return Box(name, before.rows[name], "removed", before.weights[name])
    same = before.inputs[name] == after.inputs[name] and before.weights[name] == after.weights[name]
    return Box(name, after.rows[name], "same" if same else "rewired", after.weights[name])


def _merged(before: _Side, after: _Side) -> list[str]:
    """The names of both graphs; a removed node stands behind the node that it followed."""
    position = {name: (float(i), 0) for i, name in enumerate(after.rows)}
    last = -1.0
    for i, name in enumerate(before.rows):
        if name in after.rows:
            last = position[name][0]
        else:
            position[name] = (last, i + 1)
    return sorted(position, key=lambda name: position[name])


def _sorted(whole: Diff) -> Diff:
    """The boxes in an order of execution, as near to the present one as there is."""
    place = {name: i for i, name in enumerate(whole.boxes)}
    order = nx.lexicographical_topological_sort(whole.graph(), key=place.__getitem__)
    return replace(whole, boxes={name: whole.boxes[name] for name in order})


def _shown(whole: Diff) -> set[str]:
    """As many regions of change as may be drawn, first to last; of one that is too large, its beginning."""
    regions = _regions(whole)
    order = list(whole.boxes)
    shown = set(sorted(regions[0], key=order.index)[:LARGE])
    for nodes in regions[1:]:
        if len(shown) + len(nodes) > LARGE:
            break
        shown |= nodes
    return shown


def _regions(whole: Diff) -> list[set[str]]:
    """The neighbourhoods of the changed nodes, those that touch as one, at the largest radius where the first fits."""
    graph = whole.graph().to_undirected()
    changed = [box.name for box in whole.changed]
    places = {name: i for i, name in enumerate(whole.boxes)}
    parts: list[set[str]] = []
    for radius in RADII:
        near = _neighbourhood(graph, changed, radius)
        parts = [set(part) for part in nx.connected_components(graph.subgraph(near))]
        parts.sort(key=lambda part: min(places[name] for name in part))
        if len(parts[0]) <= LARGE:
            break
    return parts


def _neighbourhood(graph: nx.Graph[str], seeds: Iterable[str], radius: int) -> set[str]:
    found = set(seeds)
    edge = set(found)
    for _ in range(radius):
        inner = {name for name in edge if graph.degree(name) <= HUB or name in seeds}
        edge = {other for name in inner for other in graph.neighbors(name)} - found
        found |= edge
    return found


def _runs_outside(whole: Diff, shown: set[str]) -> list[list[str]]:
    """Nodes that are executed one after the other and not shown. To fold such a run cannot make a cycle."""
    return [list(names) for hidden, names in groupby(whole.boxes, lambda name: name not in shown) if hidden]


def _fold_by_owner(whole: Diff) -> Diff:
    """One box per run of nodes of the same module, at the deepest level that is not too much."""
    deepest = max(box.row.owner.count(".") + 1 for box in whole.boxes.values())
    for depth in range(deepest, 0, -1):

        def owner(name: str, depth: int = depth) -> str:
            return ".".join(whole.boxes[name].row.owner.split(".")[:depth])

        runs = [list(names) for _, names in groupby(whole.boxes, owner)]
        if len(runs) <= LARGE:
            return _fold(whole, runs)
    return _fold(whole, [list(whole.boxes)])


def _fold(whole: Diff, runs: list[list[str]]) -> Diff:
    """Each run as one box, unless it is a single node."""
    runs = [run for run in runs if len(run) > 1]
    place = {name: run[0] for run in runs for name in run}
    heads = {run[0]: run for run in runs}
    boxes: dict[str, Box] = {}
    for name, box in whole.boxes.items():
        if name in heads:
            boxes[name] = _folded(whole, heads[name])
        elif name not in place:
            boxes[name] = box
    before, after = (_moved(edges, place) for edges in (whole.before, whole.after))
    return Diff(boxes, before, after)


def _folded(whole: Diff, run: list[str]) -> Box:
    owner = _common([whole.boxes[name].row.owner.split(".") for name in run])
    row = NodeRow(name=run[0], op="call_function", target=f"{len(run)} nodes", owner=owner)
    return Box(run[0], row, "fold", folded=tuple(run))


def _common(owners: list[list[str]]) -> str:
    """The innermost module that holds all owners."""
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*owners, strict=False))
    return ".".join(column[0] for column in columns)


def _moved(edges: frozenset[Edge], place: dict[str, str]) -> frozenset[Edge]:
    moved = ((place.get(source, source), place.get(target, target)) for source, target in edges)
    return frozenset((source, target) for source, target in moved if source != target)
