"""Choices without a fixed k: a threshold with at least one, and all experts in splits."""

from __future__ import annotations

import torch

from gatecc.ir.gates.choice import Choice


def test_above_the_threshold_and_at_least_one() -> None:
    z = torch.tensor([[2.0, 2.0, -9.0], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    choice = Choice.parse("threshold(t=0.4, renorm=False)")
    weights, indices = choice(z, choice.buffers(3), False)
    assert indices.tolist() == [[0, 1, 3], [0, 3, 3], [0, 3, 3]]
    torch.testing.assert_close(weights[1], torch.tensor([1 / 3, 0.0, 0.0]))


def test_the_threshold_is_a_buffer() -> None:
    choice = Choice.parse("threshold(t=0.4)")
    named = choice.buffers(3)
    z = torch.tensor([[2.0, 1.0, 0.0]])
    assert (choice(z, named, False).indices < 3).sum() == 1
    named["threshold"].fill_(0.0)
    assert (choice(z, named, False).indices < 3).sum() == 3


def test_weights_of_each_split_sum_to_one() -> None:
    z = torch.randn(5, 6)
    weights, indices = Choice.parse("dense(score=sigmoid, splits=2)")(z, {}, False)
    assert indices.tolist() == [[0, 1, 2, 3, 4, 5]] * 5
    s = torch.sigmoid(z).view(5, 2, 3)
    torch.testing.assert_close(weights.view(5, 2, 3), s / s.sum(-1, keepdim=True))


def test_one_split_is_poly_and_zeros_are_the_mean() -> None:
    z = torch.zeros(2, 4)
    weights, _ = Choice.parse("dense(score=sigmoid)")(z, {}, False)
    torch.testing.assert_close(weights, torch.full((2, 4), 0.25))
