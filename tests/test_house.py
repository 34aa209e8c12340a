"""The package keeps to the shape that tools/house.py checks, and each of its checks finds what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import house
from tools.layers import Layer


def test_the_house_is_in_order() -> None:
    assert [*house.circles(), *house.peers(), *house.long_files(), *house.retired_names()] == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package of two files in two folders of a repository."""
    (tmp_path / "gatecc" / "ir").mkdir(parents=True)
    (tmp_path / "gatecc" / "__init__.py").write_text("")
    (tmp_path / "gatecc" / "ir" / "__init__.py").write_text("")
    (tmp_path / "gatecc" / "ir" / "one.py").write_text("from gatecc.ir.other import name\n")
    (tmp_path / "gatecc" / "ir" / "other.py").write_text("name = 1\n")
    return tmp_path


@pytest.mark.parametrize(
    "back",
    [
        "def f():\n    import gatecc.ir.one\n",
        "from gatecc.ir import one\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .one import name\n",
    ],
)
def test_a_circle_is_found_wherever_it_closes(tree: Path, back: str) -> None:
    assert house.circles(tree) == []
    (tree / "gatecc" / "ir" / "other.py").write_text(back)
    assert house.circles(tree) == ["files import each other: gatecc/ir/one.py, gatecc/ir/other.py"]


def test_a_circle_over_three_files_is_found(tree: Path) -> None:
    (tree / "gatecc" / "ir" / "other.py").write_text("import gatecc.ir.third\n")
    (tree / "gatecc" / "ir" / "third.py").write_text("import gatecc.ir.one\n")
    assert len(house.circles(tree)) == 1


def test_a_row_with_too_many_peers_is_found() -> None:
    assert house.peers((Layer(("a", "b", "c"), peers=True), Layer(("d", "e", "f", "g")))) == []
    assert "4 peers" in house.peers((Layer(("a", "b", "c", "d"), peers=True),))[0]


def test_a_long_file_is_found(tree: Path) -> None:
    (tree / "tests").mkdir()
    (tree / "tests" / "test_long.py").write_text("x = 1\n" * 400)
    assert house.long_files(tree) == []
    (tree / "tests" / "test_long.py").write_text("x = 1\n" * 401)
    assert house.long_files(tree) == ["tests/test_long.py: 401 lines; at most 400"]


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("ways.py", "", "gatecc/ir/ways.py:1: `ways`"),
        ("one.py", "class Recurrence:\n    pass\n", "gatecc/ir/one.py:1: `Recurrence`"),
        ("one.py", "\ndef _worked(x):\n    pass\n", "gatecc/ir/one.py:2: `_worked`"),
        ("one.py", "x = 1  # the how-manyth call\n", "gatecc/ir/one.py:1: `how-manyth`"),
    ],
)
def test_a_retired_name_is_found(tree: Path, file: str, text: str, found: str) -> None:
    (tree / "gatecc" / "ir" / file).write_text(text)
    assert [row[: len(found)] for row in house.retired_names(tree)] == [found]


def test_words_that_only_look_like_retired_ones_pass(tree: Path) -> None:
    text = "def always(): ...\ndef kinds_of_sites(): ...\nclass Aids: ...\n"
    (tree / "gatecc" / "ir" / "one.py").write_text(text)
    assert house.retired_names(tree) == []
