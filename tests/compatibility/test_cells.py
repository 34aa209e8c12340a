"""A pairwise cover of the matrix of compatibility: each cell is what the page says, and none fails."""

from __future__ import annotations

import itertools

import pytest

from tests.compatibility.cells import Cell, cover, every_cell, run
from tests.compatibility.page import read, word

CELLS = cover()
SAID = read()


def test_every_pair_is_covered() -> None:
    """By counting, not by the greedy choice's own books."""
    names = [(c.recipe, c.wrapper, c.mode) for c in every_cell()]
    chosen = [(c.recipe, c.wrapper, c.mode) for c in CELLS]
    for i, j in itertools.combinations(range(3), 2):
        assert {(n[i], n[j]) for n in names} == {(n[i], n[j]) for n in chosen}
    assert len(chosen) < len(names) / 4


@pytest.mark.broad(3)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell) -> None:
    """Each cell is what docs/compatibility.md says. Where the page blames a library, another version may work."""
    outcome = run(cell)
    assert word(outcome) == SAID[cell] or (outcome.kind, SAID[cell]) == ("works", "library"), outcome
    assert outcome.kind != "fails", outcome.text
