"""examples/conditional_computation.py on fewer units and epochs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from examples.conditional_computation import GATES, digits, gated, run
from gatecc.train import set_reward


@pytest.mark.parametrize("name", GATES)
def test_every_estimator_learns_and_skips(name: str) -> None:
    """Chance is 0.1. What is skipped makes no difference, and something is skipped."""
    out = run(name, epochs=8, units=32, price=0.3)
    assert out.accuracy > 0.75
    assert 0.05 < out.active < 0.98
    assert out.skip_error < 1e-4


def test_reinforce_in_a_transformed_model_is_the_score_function() -> None:
    """The gradient of the gate, against the log likelihood of the sample that the seed gives."""
    x, y, _, _ = digits()
    x, y = x[:16], y[:16]
    model, gate = gated("reinforce", 12, x[:4])
    model.train()
    torch.manual_seed(3)
    loss = F.cross_entropy(model(x), y, reduction="none")
    set_reward(model, loss.detach())
    loss.mean().backward()

    weight = gate.get_parameter("weight").detach().clone().requires_grad_()
    p = torch.sigmoid(F.linear(x, weight, gate.get_parameter("bias")))
    torch.manual_seed(3)
    bits = (torch.rand_like(p) < p).float()
    score = (bits - p.detach()).square()
    others = score.sum(0) - score
    baseline = ((score * loss.detach()[:, None]).sum(0) - score * loss.detach()[:, None]) / others
    likelihood = bits * torch.log(p) + (1 - bits) * torch.log(1 - p)
    (want,) = torch.autograd.grad(((loss.detach()[:, None] - baseline) * likelihood).sum() / 16, weight)
    torch.testing.assert_close(gate.get_parameter("weight").grad, want, atol=1e-6, rtol=1e-4)
