"""topk_mass, the label of Fire Together Wire Together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gatecc.ir.gates.label import topk_mass


def test_by_hand() -> None:
    response = torch.tensor([[5.0, 1.0, 3.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert topk_mass(response, 0.5).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert topk_mass(response, 0.8).tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]
    assert topk_mass(torch.zeros(1, 3), 1.0).tolist() == [[1, 1, 1]]


@given(st.lists(st.integers(0, 100), min_size=2, max_size=9), st.floats(0.05, 0.95))
def test_it_is_the_smallest_such_set(masses: list[int], r: float) -> None:
    response = torch.tensor(masses, dtype=torch.float64)
    label = topk_mass(response, r)
    kept, whole = response[label > 0], response.sum()
    assert kept.sum() >= r * whole - 1e-9
    if len(kept):
        assert kept.sum() - kept.min() < r * whole + 1e-9
        assert all(kept.min() >= dropped for dropped in response[label == 0])
