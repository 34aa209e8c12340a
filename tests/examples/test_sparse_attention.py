"""The parts of examples/sparse_attention.py, with a few steps."""

from __future__ import annotations

import pytest
import torch

from examples import sparse_attention as sparse


@pytest.mark.parametrize("by_token", [False, True])
def test_pairs_are_recalled_with_all_blocks_as_without_gates(monkeypatch: pytest.MonkeyPatch, by_token: bool) -> None:
    monkeypatch.setattr(sparse, "SHARES", (1.0,))
    monkeypatch.setattr(sparse, "RECALL", {"vocabulary": 32, "pairs": 2, "fill": False})
    found = sparse.on_pairs(steps=20, gate_steps=2, length=128, by_token=by_token, block=16)
    assert found["100%"] == pytest.approx(found["dense"])


def test_a_figure_is_that_of_the_share_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept when recall is measured; once it stood beside the share of the row above."""
    kept: list[float] = []

    def recalled(model: torch.nn.Module, length: int) -> float:
        ids = next(sparse.pairs(length, 1, 2, seed=10**4))[0]
        kept.append(sparse.kept(model, (ids,)) if dict(model.named_buffers()) else 1.0)
        return kept[-1]

    monkeypatch.setattr(sparse, "recalled", recalled)
    monkeypatch.setattr(sparse, "SHARES", (1.0, 0.5))
    monkeypatch.setattr(sparse, "RECALL", {"vocabulary": 32, "pairs": 2, "fill": False})
    found = sparse.on_pairs(steps=2, gate_steps=1, length=128, by_token=False, block=16)
    assert kept[-1] < 0.6
    assert list(found) == ["dense", *(f"{share:.0%}" for share in kept[1:])]


def test_short_attention_is_timed_both_ways() -> None:
    with torch.no_grad():
        assert all(seconds > 0 for seconds in sparse.on_time(128, 0.5))
