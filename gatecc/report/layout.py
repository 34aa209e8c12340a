"""Places for the nodes of an acyclic graph: layers from top to bottom, few crossings, straight edges.

The usual four steps of Sugiyama, Tagawa and Toda (1981): layers, dummy nodes on long edges, order by barycentre, then
coordinates. The coordinates of a layer are the least-squares fit to the wanted ones that keeps nodes apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

SWEEPS = 8
Node = str | tuple[str, str, int]  # a dummy is (source, target, layer)
Point = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """``places`` are the centres of the nodes; ``routes`` the points that an edge passes, its ends included."""

    places: Mapping[str, Point]
    routes: Mapping[tuple[str, str], tuple[Point, ...]]
    width: float
    height: float


def layout(graph: nx.DiGraph[str], width: float, dummy_width: float, step: float) -> Layout:
    """Lay out a DAG whose nodes are ``width`` wide, with ``step`` between layers. Same graph, same layout."""
    layer = _layers(graph)
    proper, chains = _with_dummies(graph, layer)
    rows = _ordered(proper, {node: layer[node] if isinstance(node, str) else node[2] for node in proper})
    room = {node: width if isinstance(node, str) else dummy_width for node in proper}
    x = _coordinates(proper, rows, room)
    left = min((x[node] - room[node] / 2 for node in proper), default=0.0)
    right = max((x[node] + room[node] / 2 for node in proper), default=0.0)
    at = {node: (x[node] - left, (i + 0.5) * step) for i, row in enumerate(rows) for node in row}
    places = {node: at[node] for node in graph}
    routes = {edge: tuple(at[node] for node in chain) for edge, chain in chains.items()}
    return Layout(places, routes, right - left, len(rows) * step)


def _layers(graph: nx.DiGraph[str]) -> dict[str, int]:
    """Longest path from a source, then everything that gets no longer edges by it sinks towards its readers."""
    order = list(nx.lexicographical_topological_sort(graph, key={node: i for i, node in enumerate(graph)}.__getitem__))
    layer: dict[str, int] = {}
    for node in order:
        layer[node] = max((layer[source] + 1 for source in graph.predecessors(node)), default=0)
    for node in reversed(order):
        readers = [layer[reader] for reader in graph.successors(node)]
        if readers and graph.in_degree(node) <= graph.out_degree(node):
            layer[node] = min(readers) - 1
    used = {level: i for i, level in enumerate(sorted(set(layer.values())))}
    return {node: used[level] for node, level in layer.items()}


def _with_dummies(
    graph: nx.DiGraph[str], layer: Mapping[str, int]
) -> tuple[nx.DiGraph[Node], dict[tuple[str, str], list[Node]]]:
    """The graph with one dummy per layer that an edge crosses, and the chain of each edge."""
    proper: nx.DiGraph[Node] = nx.DiGraph()
    proper.add_nodes_from(graph)
    chains: dict[tuple[str, str], list[Node]] = {}
    for source, target in graph.edges:
        dummies: list[Node] = [(source, target, level) for level in range(layer[source] + 1, layer[target])]
        chains[source, target] = [source, *dummies, target]
        proper.add_edges_from(pairwise(chains[source, target]))
    return proper, chains


def _ordered(graph: nx.DiGraph[Node], layer: Mapping[Node, int]) -> list[list[Node]]:
    """The nodes of each layer from left to right, sorted by the mean place of their neighbours, down and up again."""
    rows: list[list[Node]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for node in graph:
        rows[layer[node]].append(node)
    best, fewest = [list(row) for row in rows], _crossings(graph, rows)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row, fixed in pairwise(rows[::-1] if not down else rows):
            _sort(fixed, row, graph.pred if down else graph.succ)
        if (count := _crossings(graph, rows)) < fewest:
            best, fewest = [list(row) for row in rows], count
    return best


def _sort(row: list[Node], fixed: list[Node], neighbours: Mapping[Node, Mapping[Node, object]]) -> None:
    place = {node: i for i, node in enumerate(fixed)}
    own = {node: i for i, node in enumerate(row)}

    def barycentre(node: Node) -> float:
        near = [place[other] for other in neighbours[node]]
        return sum(near) / len(near) if near else own[node]

    row.sort(key=barycentre)


def _crossings(graph: nx.DiGraph[Node], rows: list[list[Node]]) -> int:
    count = 0
    for upper, lower in pairwise(rows):
        place = {node: i for i, node in enumerate(lower)}
        ends = [end for node in upper for end in sorted(place[target] for target in graph.successors(node))]
        count += sum(a > b for i, a in enumerate(ends) for b in ends[i + 1 :])
    return count


def _coordinates(graph: nx.DiGraph[Node], rows: list[list[Node]], room: Mapping[Node, float]) -> dict[Node, float]:
    """x of each node: repeatedly as near to its neighbours as the order and the widths of its layer allow."""
    x: dict[Node, float] = {}
    for row in rows:
        x.update(zip(row, _apart([0.0] * len(row), [room[node] for node in row]), strict=True))
    for sweep in range(2 * SWEEPS):
        sides = (graph.pred, graph.succ) if sweep >= SWEEPS else ((graph.pred,) if sweep % 2 == 0 else (graph.succ,))
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            wanted = [_mean([x[other] for side in sides for other in side[node]], x[node]) for node in row]
            x.update(zip(row, _apart(wanted, [room[node] for node in row]), strict=True))
    return x


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _apart(wanted: list[float], widths: list[float]) -> list[float]:
    """The nearest places to the wanted ones (least squares) that keep the order and do not overlap.

    With the widths before each node taken off, that is isotonic regression: pool neighbours that violate the order.
    """
    offsets = [0.0]
    for left, right in pairwise(widths):
        offsets.append(offsets[-1] + (left + right) / 2)
    pools: list[tuple[float, int]] = []  # mean, number of nodes
    for want, offset in zip(wanted, offsets, strict=False):
        mean, count = want - offset, 1
        while pools and pools[-1][0] >= mean:
            other, number = pools.pop()
            mean, count = (mean * count + other * number) / (count + number), count + number
        pools.append((mean, count))
    fitted = [mean for mean, count in pools for _ in range(count)]
    return [place + offset for place, offset in zip(fitted, offsets, strict=False)]
