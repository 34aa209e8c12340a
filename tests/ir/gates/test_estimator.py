"""Estimators: what they sample, and the gradient that they give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gatecc.ir.gates.activation import Activation
from gatecc.ir.gates.estimator import Estimator

SIGMOID = Activation.parse("sigmoid")
Z = torch.tensor([[0.5, -1.0, 2.0]])


def draw(estimator: str, z: Tensor, activation: Activation = SIGMOID) -> Tensor:
    chosen = Estimator.parse(estimator)
    return chosen.sample(z, activation, chosen.buffers(), lambda: torch.tensor([[3.0, 1.0, 0.1]]))


def gradient(estimator: str, activation: Activation = SIGMOID) -> Tensor:
    z = Z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(draw(estimator, z, activation).sum(), z)
    return grad


@pytest.mark.parametrize(("estimator", "mean"), [("st", 1.0), ("times_smooth", 1.0), ("gumbel(discrete=True)", 1.0)])
def test_samples_have_the_mean_p(estimator: str, mean: float) -> None:
    many = draw(estimator, Z.expand(20_000, 3))
    torch.testing.assert_close(many.mean(0) * mean, torch.sigmoid(Z[0]), atol=0.02, rtol=0)


def test_straight_through_gradients() -> None:
    p = torch.sigmoid(Z)
    torch.testing.assert_close(gradient("st"), p * (1 - p))
    torch.testing.assert_close(gradient("st(to=logit)"), torch.ones(1, 3))
    assert gradient("st")[0, 0] < 0.25 == float(torch.sigmoid(torch.zeros(1)) ** 2)


def test_deterministic_straight_through() -> None:
    assert draw("st(stochastic=False)", Z).tolist() == [[1.0, 0.0, 1.0]]
    assert draw("st(stochastic=False)", Z, Activation.parse("threshold(0.8)")).tolist() == [[0.0, 0.0, 1.0]]


def test_one_hot_samples_follow_the_softmax() -> None:
    softmax = Activation.parse("softmax(T=2)")
    for estimator in ("st", "gumbel(discrete=True)"):
        many = draw(estimator, Z.expand(20_000, 3), softmax)
        assert (many.sum(-1) == 1).all()
        torch.testing.assert_close(many.mean(0), torch.softmax(Z[0] / 2, -1), atol=0.02, rtol=0)
        assert Estimator.parse(estimator).decide(Z, softmax).tolist() == [[0.0, 0.0, 1.0]]


def test_gumbel_sharpens_with_its_temperature() -> None:
    def distance(T: float) -> float:
        soft = draw(f"gumbel(T={T})", Z.expand(2000, 3))
        return float(torch.minimum(soft, 1 - soft).mean())

    assert distance(0.05) < 0.02 < distance(1.0)


def test_times_smooth_has_the_gradient_of_the_smooth_factor() -> None:
    z = Z.expand(1000, 3).clone().requires_grad_()
    gate = draw("times_smooth", z)
    (grad,) = torch.autograd.grad(gate.sum(), z)
    p = torch.sigmoid(z)
    torch.testing.assert_close(grad, (gate > 0) * 0.5 * torch.sqrt(p) * (1 - p))
    assert ((gate == 0) | (gate == torch.sqrt(p))).all()


def test_noise_explores_in_training_only() -> None:
    noisy = torch.stack([draw("noise(std=0.5)", Z, Activation.parse("linear")) for _ in range(4000)])
    torch.testing.assert_close(noisy.mean(0), Z, atol=0.04, rtol=0)
    torch.testing.assert_close(noisy.std(0), torch.full((1, 3), 0.5), atol=0.03, rtol=0)
    assert torch.equal(Estimator.parse("noise").decide(Z, SIGMOID), torch.sigmoid(Z))


def test_supervised_gates_learn_labels_and_not_the_task() -> None:
    """The labels of the response (3, 1, 0.1) for r = 0.9 are (1, 1, 0)."""
    p = torch.sigmoid(Z)
    want = (p - torch.tensor([[1.0, 1.0, 0.0]])) / 3
    threshold = Activation.parse("threshold")
    torch.testing.assert_close(gradient("supervised(label=topk_mass(r=0.9))", threshold), want)
    torch.testing.assert_close(gradient("supervised(weight=2.0)", threshold), 2 * want)
    torch.testing.assert_close(gradient("supervised(joint=True)", threshold), want + p * (1 - p))
