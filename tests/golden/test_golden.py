"""Every golden case comes out as it is written. ``python -m tests.golden`` writes them anew; read the difference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.case import FOLDER, Case, cases, rerun


@pytest.mark.parametrize("path", cases(), ids=lambda path: str(path.relative_to(FOLDER).with_suffix("")))
def test_case_comes_out_as_written(path: Path) -> None:
    written, now = rerun(path)
    assert now == written


def test_a_case_is_its_own_text() -> None:
    texts = [path.read_text() for path in cases()]
    assert len(texts) >= 12
    assert all(str(Case.read(text)) == text for text in texts)


def test_a_changed_graph_is_noticed() -> None:
    text = (FOLDER / "gate" / "token.txt").read_text()
    assert str(Case.read(text.replace("sigmoid", "1+tanh", 1)).run()) != text
