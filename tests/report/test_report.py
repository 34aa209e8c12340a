from __future__ import annotations

import io
import json
import math
from dataclasses import asdict
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given
from rich.console import Console

from gatecc.errors import ArgumentError
from gatecc.report import GraphPair, Report
from tests.report.sample import compiled_report, full_report, reports


def test_json_keeps_everything() -> None:
    report = full_report()
    assert Report.from_json(report.to_json()) == report


@given(reports())
def test_json_round_trip_of_any_report(report: Report) -> None:
    # Through repr, because NaN is not equal to itself.
    assert repr(Report.from_json(report.to_json())) == repr(report)


def test_json_is_strict_even_with_nan() -> None:
    report = full_report()
    report.totals = type(report.totals)(max_error=math.nan, contract="exact")

    def refuse(text: str) -> float:
        raise AssertionError(text)

    json.loads(report.to_json(), parse_constant=refuse)
    error = Report.from_json(report.to_json()).totals.max_error
    assert error is not None
    assert math.isnan(error)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 99}', '{"version": 1, "sites": 3}', '{"version": 1, "colour": 3}'],
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError):
        Report.from_json(text)


def test_a_compilation_as_text_and_json() -> None:
    report = compiled_report(layers=64)
    assert Report.from_json(report.to_json()) == report
    text = str(report)
    assert "TinyDecoder compiled for training\n2 graphs, 1 break; 64 places lowered, 1 left alone" in text
    assert "layers.[0-63].attn" in text
    assert "sites" not in text
    for words in ("half of the scores", "it is an input", "model.py:41", "torch.where"):
        assert words in text


def test_text_groups_layers_but_data_does_not() -> None:
    report = full_report(layers=64)
    text = str(report)
    assert "layers.[0-63].attn" in text
    assert text.count("attn") < 7
    assert "new layers.[0-63].attn.gate" in text
    assert "drop layers.[0-63].attn.q" in text
    assert len(report.sites) == 64
    for word in ("GCC104", "a softmax over experts", "select MLP sites instead", "data-dependent branch", "use_cache"):
        assert word in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_print_fits_the_terminal_and_has_no_colour_codes_in_a_file(width: int) -> None:
    out = io.StringIO()
    full_report().print(Console(file=out, width=width))
    assert max(map(len, out.getvalue().splitlines())) <= width
    # Wrapped, not cut off.
    letters = "".join(out.getvalue().split())
    for word in ("causal+padding,", "heads", "layers.[0-2].attn", "instead"):
        assert word in letters
    assert "\x1b" not in out.getvalue()


@given(reports())
def test_any_text_is_printed_as_it_is(report: Report) -> None:
    # No markup is read out of names such as "[bold]" and nothing raises.
    report.notes = ["[red]not markup[/red] [/]"]
    assert "[red]not markup[/red] [/]" in str(report)


def test_save_by_suffix(tmp_path: Path) -> None:
    report = full_report()
    loaded = Report.from_json(report.save(tmp_path / "new" / "r.json").read_text())
    assert asdict(loaded) == asdict(report)
    assert report.save(tmp_path / "r.txt").read_text().startswith("TinyEncoder after gated-attention")
    assert report.save(tmp_path / "r.html").read_text() == report.to_html()
    with pytest.raises(ArgumentError, match=r"\.json, \.html, \.txt, \.graphml, \.dot"):
        report.save(tmp_path / "r.pdf")
    assert not (tmp_path / "r.pdf").exists()


def test_the_graph_alone(tmp_path: Path) -> None:
    report = full_report(1)
    graph = report.to_networkx()
    assert graph.nodes["mul_0"]["inserted_by"] == "gate"
    assert graph.edges["gate_0", "mul_0"]["position"] == "1"
    assert set(nx.read_graphml(report.save(tmp_path / "g.graphml"))) == set(graph)
    assert '"relu_0" -> "mul_0"' in report.save(tmp_path / "g.dot").read_text()


def test_several_graphs_are_told_apart_by_their_scope() -> None:
    report = full_report(1)
    pair = report.graphs[0]
    report.graphs = [
        GraphPair(("a", "b"), pair.before, pair.after),
        GraphPair(("c",), pair.before),
        GraphPair(("c",), pair.before),
    ]
    names = set(report.to_networkx())
    assert {"a/mul_0", "a/add_0", "c/add_0", "c@1/add_0"} < names
    assert "c/mul_0" not in names
    assert len(Report().to_networkx()) == 0
