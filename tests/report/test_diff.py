from __future__ import annotations

import networkx as nx
from hypothesis import given

from gatecc.report import GraphDump, GraphPair, Report
from gatecc.report.diff import LARGE, Diff, diffs, region
from tests.report.sample import gated_layer, node, reports


def states(found: Diff) -> dict[str, str]:
    return {box.name: box.state for box in found.changed}


def test_inserted_nodes_are_added_and_their_readers_rewired() -> None:
    (found,) = diffs(gated_layer(1))
    assert states(found) == {"mul_0": "added", "add_0": "rewired"}
    assert ("relu_0", "add_0") in found.before - found.after
    assert {("relu_0", "mul_0"), ("mul_0", "add_0")} == found.after - found.before


def test_parameters_are_written_into_their_readers() -> None:
    (found,) = diffs(gated_layer(1))
    assert found.boxes["mul_0"].weights == ("layers.0.gate.weight",)
    assert not any(box.row.op == "get_attr" for box in found.boxes.values())


def test_removed_nodes_keep_their_place_in_the_order() -> None:
    pair = gated_layer(1)
    assert pair.after is not None
    (found,) = diffs(GraphPair(("",), pair.after, pair.before))
    assert states(found) == {"mul_0": "removed", "add_0": "rewired"}
    order = list(found.boxes)
    assert order.index("relu_0") < order.index("mul_0") < order.index("add_0")


def test_an_inspected_graph_has_no_change() -> None:
    (found,) = diffs(GraphPair(("",), gated_layer(2).before))
    assert not found.changed
    assert found.before == found.after


def test_reordered_nodes_are_compared_side_by_side() -> None:
    x = node("x", op="placeholder")
    before = GraphDump((x, node("a", "x"), node("b", "a")))
    after = GraphDump((x, node("b", "x"), node("a", "b")))
    first, second = diffs(GraphPair(("",), before, after))
    assert first.before == {("x", "a"), ("a", "b")}
    assert second.after == {("x", "b"), ("b", "a")}


def test_a_large_graph_is_cut_down_to_its_changes() -> None:
    pair = gated_layer(60)
    before = GraphPair(("",), pair.before, _only_first_gate(pair))
    (whole,) = diffs(before)
    part = region(whole)
    assert len(part.boxes) <= LARGE < len(whole.boxes)
    assert states(part) == states(whole)
    assert any(box.state == "fold" for box in part.boxes.values())
    hidden = {name for box in part.boxes.values() for name in box.folded}
    assert hidden | set(part.boxes) == set(whole.boxes)


def test_many_changes_are_counted_even_where_they_are_not_drawn() -> None:
    (whole,) = diffs(gated_layer(100))
    part = region(whole)
    assert len(part.boxes) <= 2 * LARGE  # what lies between them folded
    assert len(part.changed) > LARGE // 4
    assert part.omitted == len(whole.changed) - len(part.changed) > 0


def test_an_unchanged_large_graph_is_folded_by_module() -> None:
    (whole,) = diffs(GraphPair(("",), gated_layer(30).before))
    part = region(whole)
    assert len(part.boxes) <= LARGE
    folds = [box for box in part.boxes.values() if box.state == "fold"]
    assert {box.row.owner for box in folds} == {f"layers.{i}" for i in range(30)}
    assert sum(len(box.folded) for box in folds) == 90


@given(reports())
def test_any_dump_gives_acyclic_unions(report: Report) -> None:
    for pair in report.graphs:
        for whole in diffs(pair):
            assert nx.is_directed_acyclic_graph(whole.graph())
            assert nx.is_directed_acyclic_graph(region(whole).graph())


def _only_first_gate(pair: GraphPair) -> GraphDump:
    """The graph before with the first gate of the graph after."""
    assert pair.after is not None
    first = {row.name: row for row in pair.after.nodes if row.name in ("gate_0", "mul_0", "add_0")}
    nodes = list(pair.before.nodes)
    at = next(i for i, row in enumerate(nodes) if row.name == "add_0")
    return GraphDump((*nodes[:at], first["gate_0"], first["mul_0"], first["add_0"], *nodes[at + 1 :]))
