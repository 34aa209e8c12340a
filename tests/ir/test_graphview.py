from __future__ import annotations

from pathlib import Path

import networkx as nx
import pydot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gatecc.capture import capture
from gatecc.ir.graphview import _quote, to_networkx, write_dot, write_graphml
from gatecc.ir.program import META, Origin, Program


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return torch.cat([y * y, x], dim=1)


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Tiny(), (torch.randn(2, 4),), dynamic="none")


def test_nodes_and_edges_are_those_of_the_graph(program: Program) -> None:
    view = to_networkx(program)
    assert list(view) == [n.name for n in program.graph.nodes]
    assert set(view.edges) == {(s.name, n.name) for n in program.graph.nodes for s in n.all_input_nodes}
    assert nx.is_directed_acyclic_graph(view)


def test_attributes_say_what_a_node_is_and_edges_where_it_goes(program: Program) -> None:
    view = to_networkx(program)
    linear = view.nodes["linear"]
    assert (linear["op"], linear["target"], linear["owner"]) == ("call_function", "aten.linear.default", "fc")
    assert (linear["shape"], linear["dtype"]) == ("2 4", "float32")
    assert view.nodes["mul"]["line"].startswith("test_graphview.py:")
    assert view.edges["linear", "mul"]["position"] == "0,1"
    assert view.edges["x", "cat"]["position"] == "0"


def test_inserted_nodes_name_their_rewrite() -> None:
    program = capture(Tiny(), (torch.randn(2, 4),))
    node = next(n for n in program.calls() if n.name == "mul")
    node.meta[META] = Origin("", inserted_by="gate")
    view = to_networkx(program)
    assert [name for name, by in view.nodes(data="inserted_by") if by] == ["mul"]


def test_graphml_reads_back_as_the_same_graph(program: Program, tmp_path: Path) -> None:
    read = nx.read_graphml(write_graphml(program, tmp_path / "g.graphml"))
    written = to_networkx(program)
    assert list(read.nodes(data=True)) == list(written.nodes(data=True))
    assert {(a, b, d["position"]) for a, b, d in read.edges(data=True)} == {
        (a, b, d["position"]) for a, b, d in written.edges(data=True)
    }


def test_dot_is_read_by_a_dot_parser(program: Program, tmp_path: Path) -> None:
    graphs = pydot.graph_from_dot_file(str(write_dot(program, tmp_path / "g.dot")))
    assert graphs is not None
    (graph,) = graphs
    clusters = graph.get_subgraphs()
    names = {n.get_name().strip('"') for cluster in clusters for n in cluster.get_nodes()}
    assert names == {n.name for n in program.graph.nodes}
    edges = {(str(e.get_source()).strip('"'), str(e.get_destination()).strip('"')) for e in graph.get_edges()}
    assert edges == set(to_networkx(program).edges)
    assert {str(cluster.get("label")).strip('"') for cluster in clusters} == {"(model)", "fc"}


@given(st.text())
def test_a_dot_string_ends_where_it_should(text: str) -> None:
    quoted = _quote(text)
    inner = quoted[1:-1]
    assert quoted[0] == quoted[-1] == '"'
    assert "\n" not in quoted
    assert '"' not in inner.replace("\\\\", "").replace('\\"', "")
    assert not inner.replace("\\\\", "").endswith("\\")
