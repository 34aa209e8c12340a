"""Noisy top-k: its load is the probability that a new draw of an expert's own noise keeps it among the k."""

from __future__ import annotations

import torch

from gatecc.ir.gates.choice import Choice


def test_no_noise_in_eval() -> None:
    z = torch.randn(9, 12)
    weights, indices = Choice.parse("noisy_topk(2)")(z, {}, False)
    top = z[:, :6].topk(2, -1)
    assert torch.equal(indices, top.indices)
    torch.testing.assert_close(weights, torch.softmax(top.values, -1))


def test_noise_has_the_scored_size() -> None:
    torch.manual_seed(0)
    z = torch.tensor([[0.0, 1.0, -40.0, 3.0]]).expand(20_000, 4)  # std: floor for the first, 3.06 for the second
    choice = Choice.parse("noisy_topk(1)")
    _, indices = choice(z, {}, True)
    wins = float((indices == 0).float().mean())
    std = torch.tensor([0.01, torch.log1p(torch.tensor(3.0).exp()) + 0.01])
    expected = float(torch.special.ndtr((torch.tensor(0.0) - 1.0) / std.square().sum().sqrt()))
    assert abs(wins - expected) < 0.01


def test_load_is_the_probability_of_a_new_draw() -> None:
    choice = Choice.parse("noisy_topk(2, learned=False, std=0.7)")
    clean = torch.tensor([[0.2, 0.9, -0.3, 0.4, 0.1]])
    torch.manual_seed(5)
    load = choice.decide(clean, {}, True).load
    assert load is not None
    torch.manual_seed(5)
    noisy = clean + torch.randn_like(clean) * 0.7
    torch.manual_seed(0)
    for e in range(5):
        others = noisy[0, [i for i in range(5) if i != e]].topk(2).values[-1]
        drawn = clean[0, e] + torch.randn(40_000) * 0.7
        assert abs(float((drawn > others).float().mean()) - float(load[0, e])) < 0.01


def test_load_has_a_gradient() -> None:
    z = torch.randn(5, 8, requires_grad=True)
    load = Choice.parse("noisy_topk(1)").decide(z, {}, True).load
    assert load is not None
    (grad,) = torch.autograd.grad(load.var(), z)
    assert (grad.abs().sum(0) > 0).all()
