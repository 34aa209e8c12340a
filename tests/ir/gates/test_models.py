"""Choices between whole models, as functions of logits."""

from __future__ import annotations

import pytest
import torch

from gatecc.errors import ArgumentError
from gatecc.ir.gates.choice import Choice

LOGITS = torch.tensor([[0.0, 1.0], [2.0, -1.0], [0.5, 0.5]])


def chosen(text: str, **buffers: torch.Tensor) -> tuple[list[list[float]], list[list[int]]]:
    choice = Choice.parse(text)
    weights, indices = choice(LOGITS, {**choice.buffers(2), **buffers}, False)
    return weights.tolist(), indices.tolist()


def test_independent() -> None:
    weights, indices = chosen("independent")
    assert weights == torch.sigmoid(LOGITS).tolist()
    assert indices == [[0, 1]] * 3


def test_among_leaves_slots_empty() -> None:
    weights, indices = chosen("among", allowed=torch.tensor([False, True]))
    assert weights == [[0.0, 1.0]] * 3
    assert indices == [[2, 1]] * 3


def test_least_adds_costs_and_lets_a_nan_through() -> None:
    assert chosen("least") == ([[1.0]] * 3, [[0], [1], [0]])
    assert chosen("least", cost=torch.tensor([2.0, 0.0]))[1] == [[1], [1], [1]]
    choice = Choice.parse("least")
    weights, _ = choice(torch.tensor([[float("nan"), 1.0]]), choice.buffers(2), False)
    assert bool(weights.isnan().all())


def test_defer_has_the_gradient_of_the_probability() -> None:
    assert chosen("defer(0.5)") == ([[1.0]] * 3, [[1], [0], [1]])
    assert chosen("defer", threshold=torch.tensor(0.9))[1] == [[0], [0], [0]]
    logits = LOGITS.clone().requires_grad_()
    choice = Choice.parse("defer")
    choice(logits, choice.buffers(2), True).weights.sum().backward()
    other = LOGITS.clone().requires_grad_()
    torch.softmax(other, -1).gather(-1, torch.tensor([[1], [0], [1]])).sum().backward()
    assert logits.grad is not None
    assert other.grad is not None
    assert torch.allclose(logits.grad, other.grad)


def test_blend_reads_the_score_of_the_first() -> None:
    weights, indices = chosen("blend(0.5, 0.1)")
    g = torch.sigmoid((0.5 - LOGITS[:, 0]) / 0.1)
    assert torch.allclose(torch.tensor(weights), torch.stack([1 - g, g], -1))
    assert indices == [[0, 1]] * 3


@pytest.mark.parametrize("text", ["blend", "defer"])
def test_for_two_alone(text: str) -> None:
    with pytest.raises(ArgumentError, match="between two experts"):
        Choice.parse(text).slots(3)
    with pytest.raises(ArgumentError, match="T"):
        Choice.parse("blend(0.5, 0.0)")
