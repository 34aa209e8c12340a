"""A pairwise cover of the matrix of compatibility: each cell works, is refused with a code, or fails in the library."""

from __future__ import annotations

import itertools

import pytest

from tests.compatibility.cells import Cell, cover, every_cell, run

CELLS = cover()
# Where a refusal would be a loss: what people do every day. Elsewhere the table allows one.
DAILY = {"none", "DDP", "FSDP2", "accelerate", "Trainer", "peft before", "peft after", "hooks", "prune"}


def test_every_pair_is_covered() -> None:
    """By counting, not by the greedy choice's own books."""
    names = [(c.recipe, c.wrapper, c.mode) for c in every_cell()]
    chosen = [(c.recipe, c.wrapper, c.mode) for c in CELLS]
    for i, j in itertools.combinations(range(3), 2):
        assert {(n[i], n[j]) for n in names} == {(n[i], n[j]) for n in chosen}
    assert len(chosen) < len(names) / 4


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell) -> None:
    outcome = run(cell)
    assert outcome.kind != "fails", outcome.text
    if cell.wrapper in DAILY and cell.mode in ("grad", "no_grad", "inference") and "whole" not in cell.recipe:
        assert outcome.kind != "refused", outcome.text
