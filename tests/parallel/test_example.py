"""examples/expert_parallel.py on two ranks: it learns, each rank holds half, and its checkpoint is whole."""

from __future__ import annotations

from typing import Any

import pytest


def test_the_example_on_two_ranks(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        run = found["example"]
        assert run["losses"][-1] < run["losses"][0]
        assert run["losses"] == ranks[0]["example"]["losses"]
        assert run["same_checkpoint"]
        assert 0.49 < run["held"] / run["whole"] < 0.52
        assert run["counted"] == pytest.approx(run["sent"], rel=1e-6)
