"""The three phases of Adaptive Computation Modules, on a layer whose inputs need one learner or all of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.capture.flops import counted
from gatecc.errors import ArgumentError
from gatecc.ir.gates.balance import Budget, Routed
from gatecc.ir.gates.choices.prefix import Prefix
from gatecc.train.prefixes import count_labels, prefix_layers, prefix_outputs


class Layer(nn.Module):
    """x: (B, N, 8)"""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """The first learner (neurons 0 to 3) does all that an input with x[0] < 0 needs."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Layer()
        with torch.no_grad():
            self.mlp.up.weight[:, 0] = 2.0
            self.mlp.up.weight[2:4, 0] = -2.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def inputs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(4, 16, 8, generator=generator)
    x[..., 0] = torch.where(torch.rand(4, 16, generator=generator) < 0.5, -3.0, 3.0)
    return x


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Model().eval()
    return model, gatecc.transform(model, gatecc.recipe("acm", scorer="mlp(8)"), (inputs(0),), verify=False)


def test_prefixes_are_sums_that_leave_earlier_learners_alone(models: tuple[nn.Module, nn.Module]) -> None:
    dense, student = models
    [(name, _, experts)] = prefix_layers(student)
    assert name == "mlp"
    x = inputs(1).flatten(0, 1)
    outputs = prefix_outputs(experts, x)
    mlp: Any = dense.get_submodule("mlp")
    hidden = F.gelu(mlp.up(x))
    for n in range(5):
        expected = hidden[:, : 4 * n] @ mlp.down.weight[:, : 4 * n].T + mlp.down.bias
        assert torch.allclose(outputs[n], expected, atol=1e-5)
    (gradient,) = torch.autograd.grad(outputs[2].sum(), experts.down_proj)
    assert gradient.flatten(1).abs().sum(-1).bool().tolist() == [False, True, False, False]


def test_a_label_is_the_first_count_after_which_the_next_learner_is_not_worth_it() -> None:
    errors = torch.tensor([[8.0, 8, 8], [4, 7.9, 4], [3.9, 1, 2], [1, 0.9, 1]])
    assert count_labels(errors, 1.25).tolist() == [1, 0, 3]


def test_phases_lower_their_losses_and_tokens_take_what_they_need(models: tuple[nn.Module, nn.Module]) -> None:
    dense, student = models[0], copy.deepcopy(models[1])
    data = [inputs(seed) for seed in range(4)]
    losses = gatecc.train.train_learners(student, dense, data, steps=30, lr=3e-3)
    assert losses[-1] < losses[0]
    losses = gatecc.train.train_counts(student, dense, data, steps=80, lr=2e-2, factor=1.05)
    assert losses[-1] < 0.5 * losses[0]
    [layer] = prefix_layers(student)
    x = inputs(9)
    with torch.no_grad():
        taken = (layer.router(x, x)[1] < 4).sum(-1).view(4, 16)
        assert float(taken[x[..., 0] < 0].float().mean()) < 0.6 * float(taken[x[..., 0] > 0].float().mean())
        assert float((student(x) - dense(x)).norm() / dense(x).norm()) < 0.2


def test_a_budget_pulls_the_mean_count_to_its_share() -> None:
    choice, logits = Prefix(lead=0.0), torch.zeros(256, 5, requires_grad=True)
    torch.manual_seed(0)
    for share, sign in ((0.0, 1.0), (1.0, -1.0)):
        decision = choice.decide(logits, {}, True)
        assert set(decision.chosen.weights.flatten().tolist()) <= {0.0, 1.0}
        taken = decision.chosen.weights.mean()
        loss = Budget(share, weight=2).loss(Routed(logits, decision, torch.ones(256, 4), torch.ones(256, 1)))
        assert float(loss.detach()) == pytest.approx(float(2 * (taken.detach() - share) ** 2), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert sign * float(gradient[:, 4].sum() - gradient[:, 0].sum()) > 0


def test_other_models_are_refused(models: tuple[nn.Module, nn.Module]) -> None:
    dense, student = models
    with pytest.raises(ArgumentError, match="no layers of learners"):
        gatecc.train.train_learners(dense, dense, [inputs(0)], steps=1)
    other = Model()
    with torch.no_grad():
        other.mlp.down.weight.neg_()
        other.mlp.down.bias.fill_(9.0)
    with pytest.raises(ArgumentError, match="mlp: the layer is something else in the teacher"):
        gatecc.train.train_learners(copy.deepcopy(student), other, [inputs(0)], steps=1)


@pytest.mark.parametrize("budget", [0.75, 0.3])
def test_end_to_end_the_budget_is_reached_and_what_is_not_taken_does_not_run(budget: float) -> None:
    torch.manual_seed(0)
    dense: Any = Model().eval()
    student = gatecc.transform(dense, gatecc.recipe("acm", scorer="mlp(8)", share=budget), (inputs(0),), verify=False)
    data = [(inputs(seed),) for seed in range(4)]
    gatecc.train.train_counts(student, dense, data, steps=20, lr=2e-2, factor=1.05)

    def loss(output: Tensor, batch: Any) -> Tensor:
        return F.mse_loss(output, dense(batch[0]).detach())

    gatecc.train.heal(student, None, data, tune=gatecc.train.Tune(steps=80, lr=2e-2, loss=loss))
    [layer] = prefix_layers(student)
    x = inputs(9)
    flat = x.flatten(0, 1)
    with torch.no_grad():
        counts = (layer.router(x, x)[1] < 4).sum(-1)
        assert float(counts.float().mean()) / 4 == pytest.approx(budget, abs=0.1)
        masked = prefix_outputs(layer.experts, flat)[counts, torch.arange(len(flat))]  # every learner ran
        assert torch.allclose(student(x).flatten(0, 1), flat + masked, atol=1e-5)
        assert float((student(x) - dense(x)).norm() / dense(x).norm()) < 0.05
    gate = counted(lambda: layer.router(x, x))[1]
    assert counted(lambda: student(x))[1] == gate + int(counts.sum()) * 2 * 2 * 8 * 4
