"""The operators of stochastic gates, against exact enumeration of their samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateModule, GateShape, GateSpec, SourceShape
from gatecc.ops.estimators import BASELINES, inject_bce, reinforce_sample, write_reward
from gatecc.train import set_reward

UNITS = 3


def loss_of(bits: Tensor) -> Tensor:
    """A loss of three bits that no sum of single ones explains: (..., 3) -> (...)."""
    return 5.0 + 2 * bits[..., 0] * bits[..., 1] - bits[..., 1] * (1 - bits[..., 2]) + 0.7 * bits[..., 2]


def exact_gradient(z: Tensor) -> Tensor:
    """d E[loss] / dz with the expectation written out over all samples."""
    z = z.clone().requires_grad_()
    p = torch.sigmoid(z)
    outcomes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=UNITS)), dtype=z.dtype)
    probability = (outcomes * p + (1 - outcomes) * (1 - p)).prod(-1)
    (grad,) = torch.autograd.grad((probability * loss_of(outcomes)).sum(), z)
    return grad


def buffers(capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(capacity), torch.zeros((), dtype=torch.int64), torch.zeros(3)


def estimate(z: Tensor, samples: int, baseline: str, told: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """REINFORCE's estimates, one per sample: (samples, UNITS)."""
    logit = z.expand(samples, UNITS).clone().requires_grad_()
    bits = reinforce_sample(logit, torch.rand(samples, UNITS), *told, baseline)
    write_reward(*told, loss_of(bits.detach()), scale=1.0)
    bits.sum().backward()
    assert logit.grad is not None
    return logit.grad


@pytest.mark.parametrize("baseline", BASELINES)
def test_reinforce_is_unbiased(baseline: str) -> None:
    z = torch.tensor([0.3, -0.8, 1.1])
    samples, told = 40_000, buffers(40_000)
    write_reward(*told, loss_of((torch.rand(1000, UNITS) < torch.sigmoid(z)).float()), scale=1.0)  # an earlier batch
    grads = estimate(z, samples, baseline, told)
    error = grads.std(0) / samples**0.5
    assert ((grads.mean(0) - exact_gradient(z)).abs() < 4 * error).all()


def test_baselines_reduce_the_variance() -> None:
    z = torch.tensor([0.3, -0.8, 1.1])
    spread = {}
    for baseline in BASELINES:
        told = buffers(4096)
        write_reward(*told, torch.full((8,), 5.5), scale=1.0)
        torch.manual_seed(0)
        spread[baseline] = float(estimate(z, 4096, baseline, told).var(0).sum())
    assert spread["mean"] < spread["none"] / 4
    assert spread["min_variance"] <= spread["leave_one_out"] < spread["none"] / 4


def test_one_unit_agrees_with_the_formula() -> None:
    """(b - p)(L - baseline) by hand."""
    logit = torch.tensor([[0.2], [-1.0]], requires_grad=True)
    told = buffers(4)
    bits = reinforce_sample(logit, torch.tensor([[0.1], [0.9]]), *told, "none")
    assert bits.tolist() == [[1.0], [0.0]]
    write_reward(*told, torch.tensor([2.0, 3.0]), scale=0.5)
    (bits * torch.tensor([[100.0], [-7.0]])).sum().backward()  # the gradient that arrives does not matter
    p = torch.sigmoid(logit.detach())
    assert logit.grad is not None
    torch.testing.assert_close(logit.grad, (bits - p) * torch.tensor([[2.0], [3.0]]) * 0.5)


def test_the_running_mean_is_that_of_earlier_batches() -> None:
    told = buffers(4)
    write_reward(*told, torch.tensor([1.0, 3.0]), scale=1.0)
    assert told[2][0] == 2.0
    write_reward(*told, torch.tensor([12.0]), scale=1.0)
    assert told[2][0] == 2.0
    write_reward(*told, torch.tensor([0.0]), scale=1.0)
    assert told[2][0] == pytest.approx(0.9 * 2 + 0.1 * 12)
    assert told[1] == 1


@pytest.mark.parametrize("loss", [torch.zeros(5), torch.zeros(2, 2), torch.zeros(()), torch.zeros(0)])
def test_a_loss_of_another_shape(loss: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"1 <= B <= 4"):
        write_reward(*buffers(4), loss, scale=1.0)


def test_a_forgotten_reward_is_named() -> None:
    logit = torch.zeros(3, 1, requires_grad=True)
    with pytest.raises(ArgumentError, match="set_reward"):
        reinforce_sample(logit, torch.rand(3, 1), *buffers(4), "mean").sum().backward()


def test_the_operators_are_well_formed() -> None:
    logit, noise, told = torch.randn(3, 2, requires_grad=True), torch.rand(3, 2), buffers(4)
    write_reward(*told, torch.rand(3), scale=1.0)
    torch.library.opcheck(torch.ops.gatecc.reinforce_sample.default, (logit, noise, *told, "mean"))
    torch.library.opcheck(torch.ops.gatecc.inject_bce.default, (logit, torch.ones(3, 2), 0.5))


# -- in a module, eager and captured -----------------------------------------------------------------------------------


class Units(nn.Module):
    """Loss of three stochastic units whose probabilities depend on x."""

    def __init__(self, estimator: str) -> None:
        super().__init__()
        shape = GateShape("bc", {"c": UNITS}, (SourceShape("bc", 2),))
        self.gate: GateModule = GateSpec("x", "linear", "channel", "sigmoid", estimator, "random(std=1)").build(shape)

    def forward(self, ones: Tensor, x: Tensor) -> Tensor:
        return loss_of(self.gate(ones, x))


@pytest.mark.parametrize("how", ["eager", "make_fx", "aot_eager"])
def test_the_reward_reaches_captured_graphs(how: str) -> None:
    """Told between forward and backward, for batches of two sizes: the graph must not keep the first one's."""
    model = Units("reinforce(baseline=none, capacity=64)").train()
    ones, x = torch.ones(8, UNITS), torch.randn(8, 2)
    call = captured(model, how, ones, x)
    for batch in (8, 5):
        model.zero_grad()
        torch.manual_seed(7)
        loss = call(ones[:batch], x[:batch])
        set_reward(model, loss.detach())
        loss.mean().backward()
        torch.manual_seed(7)
        z = F.linear(x[:batch], model.gate.get_parameter("weight"), model.gate.get_parameter("bias"))
        p = torch.sigmoid(z)
        bits = (torch.rand_like(z) < p).float()
        torch.testing.assert_close(loss_of(bits), loss)
        surrogate = (loss.detach()[:, None] * torch.log(bits * p + (1 - bits) * (1 - p))).sum() / batch
        (grad,) = torch.autograd.grad(surrogate, model.gate.get_parameter("weight"))
        torch.testing.assert_close(model.gate.get_parameter("weight").grad, grad)


def captured(model: Units, how: str, ones: Tensor, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    if how == "eager":
        return model
    if how == "aot_eager":
        return cast("Callable[[Tensor, Tensor], Tensor]", torch.compile(model, backend="aot_eager", dynamic=True))

    def run(live: dict[str, Tensor], ones: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, live, (ones, x))

    live = dict(model.named_parameters()) | dict(model.named_buffers())
    graph = make_fx(run, tracing_mode="symbolic", pre_dispatch=True)(live, ones, x)
    return lambda ones, x: graph(live, ones, x)


def test_set_reward_needs_a_gate() -> None:
    with pytest.raises(ArgumentError, match="REINFORCE"):
        set_reward(nn.Linear(2, 2), torch.zeros(2))


def test_reinforce_learns() -> None:
    """The loss is least with bits (0, 1, 0); gradients through a sample would be zero here."""
    model = Units("reinforce").train()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    ones, x = torch.ones(64, UNITS), torch.randn(64, 2)
    for _ in range(150):
        loss = model(ones, x)
        set_reward(model, loss.detach())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert model.eval()(ones, x).mean() < 4.2


# -- injected labels ---------------------------------------------------------------------------------------------------


def test_injected_labels_have_the_gradient_of_their_loss() -> None:
    logit, label = torch.randn(4, 3, requires_grad=True), (torch.rand(4, 3) > 0.5).float()
    out = inject_bce(logit, label, 0.3)
    assert torch.equal(out, logit)
    (got,) = torch.autograd.grad(out.sum() * 2, logit)
    (want,) = torch.autograd.grad(logit.sum() * 2 + 0.3 * F.binary_cross_entropy_with_logits(logit, label), logit)
    torch.testing.assert_close(got, want)


def test_transforms_of_an_injected_loss() -> None:
    logit, label = torch.randn(3, UNITS), torch.rand(3, UNITS).round()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return inject_bce(x, y, 0.5).square().sum()

    def written(x: Tensor, y: Tensor) -> Tensor:
        return x.square().sum() + 0.5 * F.binary_cross_entropy_with_logits(x, y)

    for found, wanted in (
        (torch.func.grad(loss)(logit, label), torch.func.grad(written)(logit, label)),
        (torch.func.vmap(torch.func.grad(loss))(logit, label), torch.func.vmap(torch.func.grad(written))(logit, label)),
    ):
        torch.testing.assert_close(found, wanted)
    leaf = logit.clone().requires_grad_()
    # Its gradient does not depend on what arrives, so that a second derivative would add it again.
    more: list[Callable[[], object]] = [
        lambda: torch.func.jvp(lambda x: loss(x, label), (logit,), (logit,)),
        lambda: torch.func.jacrev(torch.func.grad(loss))(logit, label),
        lambda: torch.func.grad(loss)(leaf, label),
        lambda: torch.autograd.grad(loss(leaf, label), leaf, create_graph=True),
    ]
    for derive in more:
        with pytest.raises(ArgumentError, match="one derivative"):
            derive()


def test_a_sample_has_one_derivative() -> None:
    logit, told = torch.zeros(4, UNITS), buffers(4)

    def sample(x: Tensor) -> Tensor:
        return reinforce_sample(x, torch.full_like(x, 0.4), *told, "none")

    assert torch.func.vmap(sample)(logit).all()
    leaf = logit.clone().requires_grad_()

    def twice() -> None:
        bits = sample(leaf)
        write_reward(*told, torch.rand(4), scale=1.0)
        (first,) = torch.autograd.grad(bits.sum(), leaf, create_graph=True)
        first.sum().backward()

    derivatives: list[Callable[[], object]] = [
        twice,
        lambda: torch.func.grad(lambda x: sample(x).sum())(logit),
        lambda: torch.func.jvp(sample, (logit,), (logit,)),
        lambda: torch.func.vmap(sample)(leaf),
    ]
    for derive in derivatives:
        with pytest.raises(ArgumentError, match="one derivative"):
            derive()
