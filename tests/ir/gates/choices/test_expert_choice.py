"""Expert choice against the definition of Zhou et al.: each expert takes its best tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatecc.ir.gates.choice import Choice


@given(tokens=st.integers(1, 12), capacity=st.sampled_from([0.3, 1.0, 1.5, 4.0]))
def test_each_expert_takes_its_best_tokens(tokens: int, capacity: float) -> None:
    torch.manual_seed(tokens)
    z = torch.randn(tokens, 4)
    choice = Choice.parse(f"expert_choice(capacity={capacity})")
    weights, indices = choice(z, choice.buffers(4), True)
    p, most = torch.softmax(z, -1), min(tokens, math.ceil(capacity * tokens / 4 - 1e-6))
    expected = torch.zeros(tokens, 4)
    for e in range(4):
        best = p[:, e].topk(most).indices
        expected[best, e] = p[best, e]
    torch.testing.assert_close(torch.zeros(tokens, 5).scatter(1, indices, weights)[:, :4], expected)


def test_all_is_lossless() -> None:
    z = torch.randn(6, 4)
    choice = Choice.parse("expert_choice")
    weights, indices = choice(z, {}, False)
    assert choice.sums_to_one
    assert indices.tolist() == [[0, 1, 2, 3]] * 6
    torch.testing.assert_close(weights, torch.softmax(z, -1))


def test_padding_is_not_chosen() -> None:
    z = torch.randn(8, 2)
    keep = torch.arange(8) % 2 == 0
    choice = Choice.parse("expert_choice(capacity=1.0)")
    _, indices = choice.decide(z, choice.buffers(2), True, keep).chosen
    assert (indices[~keep] == 2).all()
    assert [(indices == e).sum().item() for e in (0, 1)] == [2, 2]  # ceil(1.0 · 4 / 2)


@pytest.mark.parametrize("text", ["expert_choice", "expert_choice(capacity=2.0)"])
def test_is_not_causal(text: str) -> None:
    assert Choice.parse(text).mixes_tokens
