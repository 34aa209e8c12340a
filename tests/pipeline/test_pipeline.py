"""The pipeline tells its observers of every step, and sites follow the edits that it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from gatecc.errors import CaptureError, GraphError
from gatecc.ir.edit import Editor
from gatecc.ir.gate import GateSpec
from gatecc.ir.site import MLP, Site
from gatecc.passes.gate import Gate
from gatecc.pipeline import Application, Stage, Times, apply, prepare
from tests.golden.reader import Reader
from tests.graphs import MLP as GRAPH

GATE = Gate(MLP[...].out, gate=GateSpec("self", granularity="token", init="zero"))
AGAIN = Gate(MLP[...].hidden, gate=GateSpec("self", init="zero"))


def test_an_observer_is_told_of_every_step_in_order() -> None:
    seen: list[Stage] = []
    prepared = prepare(Reader(GRAPH).program, seen.append)
    apply(prepared, [GATE, AGAIN], seen.append)
    assert [stage.name for stage in seen] == ["canonicalize", "match", "rewrite", "rewrite", "clean"]
    assert [stage.rewrite for stage in seen] == [None, None, GATE, AGAIN, None]
    first, second = seen[2:4]
    assert second.nodes > first.nodes == len(Reader(GRAPH).program.graph.nodes)


def test_times_are_added_up_and_handed_on() -> None:
    seen: list[Stage] = []
    times = Times(then=seen.append)
    apply(prepare(Reader(GRAPH).program, times), [GATE, AGAIN], times)
    assert set(times.seconds) == {"canonicalize", "match", "rewrite", "clean"}
    assert times.seconds["rewrite"] == pytest.approx(sum(s.seconds for s in seen if s.name == "rewrite"))


def test_sites_follow_edits() -> None:
    prepared = prepare(Reader(GRAPH).program)
    (site,) = (s for s in prepared.sites if s.kind == "mlp")
    ((edit,),) = apply(prepared, [GATE])
    (after,) = (s for s in prepared.sites if s.kind == "mlp")
    assert after.values["out"].node in edit.inserted
    assert after.values["hidden"].node is site.values["hidden"].node


def test_modules_that_were_made_before_are_found_again() -> None:
    own: set[str] = set()
    program = Reader(GRAPH).program
    apply(prepare(program), [GATE], own=own)
    again = Reader(GRAPH).program
    again.module = program.module
    apply(prepare(again), [GATE], own=own)
    assert own == {"mlp.gate"}


def test_a_place_that_the_graph_lacks_is_named() -> None:
    with pytest.raises(CaptureError, match="no mlp site #7") as raised:
        apply(prepare(Reader(GRAPH).program), [Application(GATE, (("mlp", 7),))])
    assert raised.value.where == "mlp"


class _Broken(Gate):
    """Fails at its site."""

    def rewrite(self, site: Site, edit: Editor) -> None:
        raise ZeroDivisionError("nothing is left")


def test_what_a_rewrite_raises_names_rewrite_and_site() -> None:
    with pytest.raises(GraphError, match="raised ZeroDivisionError") as raised:
        apply(
            prepare(Reader(GRAPH).program),
            [_Broken(MLP[...].out, gate=GateSpec("self", granularity="token", init="zero"))],
        )
    assert "mlp#0" in raised.value.where
    assert "nothing is left" in raised.value.found


def test_debug_prints_a_line_and_writes_the_graph_of_each_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("GATECC_DEBUG", str(tmp_path / "steps"))
    apply(prepare(Reader(GRAPH).program), [GATE])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2].split()[0] for line in lines] == ["canonicalize", "match", "rewrite", "clean"]
    files = sorted((tmp_path / "steps").iterdir())
    assert [path.stem.rpartition("-")[2] for path in files] == ["canonicalize", "match", "rewrite", "clean"]
    assert "sigmoid" not in files[1].read_text()
    assert "sigmoid" in files[2].read_text()


def test_debug_is_silent_unless_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("GATECC_DEBUG", raising=False)
    prepare(Reader(GRAPH).program)
    assert capsys.readouterr().err == ""
