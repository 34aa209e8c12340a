"""FP4 against grids that are written out: the nearest number, the end of the grid, the best grid of a column."""

from __future__ import annotations

import numpy as np
import pytest

from gatecc.codegen.onnx.fp4 import columns, rounded

GRIDS = {
    (2, 1): (0, 0.5, 1, 1.5, 2, 3, 4, 6),
    (1, 2): (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75),
    (3, 0): (0, 1, 2, 4, 8, 16, 32, 64),
}


@pytest.mark.parametrize("bits", GRIDS)
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_the_nearest_number_of_the_grid(bits: tuple[int, int], scale: float) -> None:
    grid = np.array(sorted({s * x for x in GRIDS[bits] for s in (1, -1)})) * scale
    x = np.random.default_rng(0).uniform(1.2 * grid.min(), 1.2 * grid.max(), 2000)
    found = rounded(x, grid.max(), *bits)
    np.testing.assert_allclose(found, grid[np.abs(x[:, None] - grid).argmin(1)], rtol=1e-12)
    np.testing.assert_allclose(rounded(grid, grid.max(), *bits), grid, rtol=1e-12)
    np.testing.assert_allclose(rounded(found, grid.max(), *bits), found, rtol=1e-12)


def test_each_column_has_the_best_of_its_grids() -> None:
    w = np.random.default_rng(1).standard_normal((40, 300)).astype(np.float32)
    w[:, 1], w[0, 2] = 0, 30
    positive = np.array(GRIDS[2, 1]) / 6
    grid = np.unique([positive, -positive])
    found = columns(w)
    assert found.dtype == w.dtype
    for i in (0, 1, 2, 257, 299):
        column = w[:, i].astype(np.float64)
        ends = np.abs(column).max() * np.linspace(0.5, 1, 21)
        tried = [end * grid[np.abs(column[:, None] - end * grid).argmin(1)] for end in ends]
        assert ((found[:, i] - column) ** 2).sum() == pytest.approx(min(((t - column) ** 2).sum() for t in tried))
    assert not found[:, 1].any()
    np.testing.assert_allclose(columns(found), found, rtol=1e-6)
