from __future__ import annotations

from itertools import pairwise

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from gatecc.report.layout import _apart, _crossings, _layers, _ordered, _with_dummies, layout


@st.composite
def dags(draw: st.DrawFn) -> nx.DiGraph[str]:
    size = draw(st.integers(1, 14))
    pairs = draw(st.sets(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=30))
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(str(i) for i in range(size))
    graph.add_edges_from((str(min(a, b)), str(max(a, b))) for a, b in sorted(pairs) if a != b)
    return graph


@given(dags())
def test_edges_go_down_and_nodes_do_not_overlap(graph: nx.DiGraph[str]) -> None:
    found = layout(graph, width=10, dummy_width=2, step=5)
    assert set(found.places) == set(graph)
    for (source, target), route in found.routes.items():
        assert route[0] == found.places[source]
        assert route[-1] == found.places[target]
        assert all(upper[1] + 5 == lower[1] for upper, lower in pairwise(route))
    rows: dict[float, list[float]] = {}
    for x, y in found.places.values():
        rows.setdefault(y, []).append(x)
        assert 5 - 1e-6 <= x <= found.width - 5 + 1e-6
        assert 0 < y < found.height
    for row in rows.values():
        assert all(right - left >= 10 - 1e-6 for left, right in pairwise(sorted(row)))


@given(dags())
def test_a_layout_is_reproducible(graph: nx.DiGraph[str]) -> None:
    assert layout(graph, 10, 2, 5) == layout(graph.copy(), 10, 2, 5)


def test_the_empty_graph() -> None:
    assert layout(nx.DiGraph(), 10, 2, 5).height == 0


def test_inputs_sink_to_their_readers() -> None:
    graph: nx.DiGraph[str] = nx.DiGraph([("x", "a"), ("a", "b"), ("b", "c"), ("mask", "expand"), ("expand", "c")])
    assert _layers(graph) == {"x": 0, "a": 1, "b": 2, "mask": 1, "expand": 2, "c": 3}


def test_crossings_that_can_be_avoided_are() -> None:
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from("abcdef")
    graph.add_edges_from([("a", "f"), ("b", "e"), ("c", "d")])
    layer = _layers(graph)
    proper, _ = _with_dummies(graph, layer)
    rows = _ordered(proper, {node: layer[node] for node in proper if isinstance(node, str)})
    assert _crossings(proper, [list("abc"), list("def")]) == 3
    assert _crossings(proper, rows) == 0


@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(1, 20)), min_size=1, max_size=6))
def test_apart_is_the_least_squares_fit(wants: list[tuple[float, float]]) -> None:
    wanted, widths = [w for w, _ in wants], [w for _, w in wants]
    placed = _apart(wanted, widths)
    gaps = [(left + right) / 2 for left, right in pairwise(widths)]
    assert all(b - a >= gap - 1e-6 for (a, b), gap in zip(pairwise(placed), gaps, strict=True))
    # No feasible direction improves: moving any suffix right, or any prefix left, only costs more.
    for i in range(len(placed)):
        assert sum(placed[j] - wanted[j] for j in range(i, len(placed))) >= -1e-6
        assert sum(placed[j] - wanted[j] for j in range(i + 1)) <= 1e-6
