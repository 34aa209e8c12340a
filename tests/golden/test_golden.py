"""Every golden case comes out as it is written. ``python -m tests.golden`` writes them anew; read the difference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.case import FOLDER, GRAPHS, LIMIT, Case, cases, rerun
from tests.golden.change import change


@pytest.mark.parametrize("path", cases(), ids=lambda path: str(path.relative_to(FOLDER).with_suffix("")))
def test_case_comes_out_as_written(path: Path) -> None:
    written, now = rerun(path)
    assert now == written


def test_a_case_is_its_own_text() -> None:
    texts = [path.read_text() for path in cases()]
    assert len(texts) >= 12
    assert all(str(Case.read(text)) == text for text in texts)


def test_a_case_is_short() -> None:
    lines = {str(path.relative_to(FOLDER)): path.read_text().count("\n") for path in cases()}
    assert not {name: n for name, n in lines.items() if n >= LIMIT}


def test_a_graph_is_there_for_its_cases() -> None:
    assert {path.stem for path in GRAPHS.glob("*.txt")} <= {Case.read(path.read_text()).before for path in cases()}


def test_a_changed_graph_is_noticed() -> None:
    text = (FOLDER / "gate" / "token.txt").read_text()
    assert str(Case.read(text.replace("sigmoid", "1+tanh", 1)).run()) != text


BEFORE = """\
@w               # 8 8
%x = input       # b 8
%a = relu(%x)    # b 8
%b = neg(%a)     # b 8
%c = exp(%b)     # b 8
%d = sin(%c)     # b 8
%e = cos(%d)     # b 8
return %e"""


def test_a_difference_shows_what_stands_around_it() -> None:
    assert change(BEFORE, BEFORE) == ""
    assert change(BEFORE, BEFORE.replace("sin(%c)     # b 8", "tan(%c)     # b 8 | m")) == (
        "  %c = exp(%b)  # b 8\n- %d = sin(%c)  # b 8\n+ %d = tan(%c)  # b 8 | m\n  %e = cos(%d)  # b 8"
    )
    two = change(BEFORE, BEFORE.replace("%e", "%f").replace("# 8 8", "# 9 8"))
    assert two.splitlines()[2:5] == ["  %x = input    # b 8", "...", "  %d = sin(%c)  # b 8"]


def test_many_lines_that_go_are_counted() -> None:
    """The first, the last, and how many stand between: which ones these are follows from the graph."""
    gone = "\n".join(line for line in BEFORE.splitlines() if line[1] not in "bcde")
    assert change(BEFORE, f"{gone}\nreturn %a").splitlines() == [
        "  %a = relu(%x)  # b 8",
        "- %b = neg(%a)   # b 8",
        "- ... 3 lines",
        "- return %e",
        "+ return %a",
    ]


def test_nodes_that_one_other_reads_stand_inside_of_it() -> None:
    after = BEFORE.replace("return %e", "%f = mul(%e, %e)\n%g = abs(%f)\n%h = add(%g, %x)  # b 8\nreturn %h")
    assert change(BEFORE, after, {"f", "g", "h"}, 20).splitlines()[2:] == [
        "+ %h = add(abs(mul(%e, %e)), %x)  # b 8",
        "+ return %h",
    ]
    assert change(BEFORE, after, {"f", "h"}, 20) == change(BEFORE, after), "what reads them is older"
    assert change(BEFORE, after, {"f", "g", "h"}, 12).count("+") == 3, "too wide"
