"""Training and calibration of exits: labels, probabilities and thresholds by hand, and a model that really learns."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gatecc
from gatecc.capture.flops import counted
from gatecc.errors import ArgumentError, TrainingError
from gatecc.passes.exit.exit import Exit
from gatecc.train import calibrate, exit_costs, exit_labels, exit_logits, exits, fit_exemplars, fit_exits
from gatecc.train.exits import exit_probabilities


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Rows(nn.Module):
    """(B, 12) -> (B, 4)"""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(4)), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def task(seed: int, samples: int) -> tuple[Tensor, Tensor]:
    """Half of the samples show their class plainly, half hide it behind a product of signs."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(samples, 12, generator=generator), torch.randint(0, 4, (samples,), generator=generator)
    plain = torch.rand(samples, generator=generator) < 0.5
    x[:, 0] = plain * 2.0
    x[plain, 1:5] += 4.0 * F.one_hot(y[plain], 4)
    bits = torch.stack([y // 2, y % 2], -1) * 2.0 - 1
    sign = torch.randint(0, 2, (samples, 2), generator=generator) * 2.0 - 1
    hard = ~plain
    x[hard, 5:7], x[hard, 7:9] = 1.5 * sign[hard], 1.5 * (bits * sign)[hard]
    return x, y


@pytest.fixture(scope="module")
def learned() -> tuple[Any, Any]:
    """A model that was trained, and the same with exits that were."""
    torch.manual_seed(0)
    model = Rows()
    x, y = task(0, 2048)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(12):
        for rows in torch.randperm(2048).split(128):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    made: Any = gatecc.transform(model, gatecc.recipe("jei-dnn"), (x[:4],))
    before = [p.clone() for p in model.parameters()]
    made.blocks[0].up.weight.requires_grad_(False)
    report = fit_exits(made, list(zip(x.split(256), y.split(256), strict=True)), steps=240, trade=0.5, lr=1e-2)
    assert not made.blocks[0].up.weight.requires_grad
    assert made.blocks[0].down.weight.requires_grad
    own = dict(made.named_parameters())
    assert all(torch.equal(own[n], p) for (n, _), p in zip(model.named_parameters(), before, strict=True))
    assert sum(report.heads[-1]) < 0.8 * sum(report.heads[0])
    assert report.gates[-1] < report.gates[0]
    return model, made


@torch.no_grad()
def test_trained_exits_keep_accuracy_for_less(learned: Any) -> None:
    model, made = learned
    x, y = task(7, 1000)
    assert [float(rule.threshold) for rule in exits(made)] == [0.5] * 3
    before, base = counted(lambda: model(x))
    after, spent = counted(lambda: made(x))
    accuracy = [float((z.argmax(-1) == y).double().mean()) for z in (before, after)]
    assert accuracy[0] > 0.85
    assert accuracy[1] > accuracy[0] - 0.05
    assert spent < 0.9 * base
    cheap = (exit_logits(made, x)[0].argmax(-1) == y).double().mean()
    assert accuracy[1] > float(cheap) + 0.1  # who leaves first is not everybody


@torch.no_grad()
def test_calibrated_thresholds_do_what_they_say(learned: Any, tmp_path: Any) -> None:
    _, made = learned
    x, y = task(8, 600)
    data = list(zip(x.split(200), y.split(200), strict=True))
    whole = counted(lambda: [rule.threshold.fill_(2.0) for rule in exits(made)] and made(x))[1]
    tried: list[Any] = [{"by": "accuracy"}, {"by": "cost", "budget": 0.6}, {"by": "loss", "trade": 1.0}]
    for how in tried:
        found = calibrate(made, data, steps=10, **how)
        out, spent = counted(lambda: made(x))
        assert float((out.argmax(-1) == y).double().mean()) == pytest.approx(found.chosen.accuracy, abs=1e-9)
        assert spent / whole == pytest.approx(found.chosen.cost, rel=1e-6)  # the table is the live run
        assert sum(found.chosen.shares) == pytest.approx(1.0)
    found = calibrate(made, data, by="quantile", steps=10)
    assert found.chosen.shares[0] == pytest.approx(0.5, abs=2e-3)
    assert found.chosen.shares[1] == pytest.approx(0.25, abs=4e-3)
    full = float(found.right[:, -1].double().mean())
    assert calibrate(made, data, steps=10).chosen.accuracy >= full
    assert calibrate(made, data, by="cost", budget=0.6, steps=10).chosen.cost <= 0.6
    for a, b in pairwise(found.curve):
        assert a.cost < b.cost
        assert a.accuracy < b.accuracy
    for point in found.curve:  # no thresholds do better than who knows
        assert max(o.accuracy for o in found.oracle if o.cost <= point.cost + 1e-9) >= point.accuracy - 0.02
    assert "<- chosen" in str(found)
    pytest.importorskip("matplotlib")
    found.draw(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_labels_and_probabilities_by_hand() -> None:
    losses = torch.tensor([[0.1, 0.0, 0.0], [2.0, 0.3, 0.2], [2.0, 2.0, 0.1], [0.0, 5.0, 5.0]])
    costs = torch.tensor([0.2, 0.6, 1.0])
    assert exit_labels(losses, costs, 1.0).tolist() == [[1, 1], [0, 1], [0, 0], [1, 1]]
    assert exit_labels(losses, costs, 0.0).tolist() == [[0, 1], [0, 0], [0, 0], [1, 1]]
    gates = torch.randn(5, 3)
    g = gates.sigmoid()
    expected = [g[:, 0], (1 - g[:, 0]) * g[:, 1], (1 - g[:, 0]) * (1 - g[:, 1]) * g[:, 2]]
    found = exit_probabilities(gates)
    assert torch.allclose(found[:, :3], torch.stack(expected, -1), atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(5), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(2, 6), st.integers(0, 10_000))
def test_labels_never_fall_along_the_exits_and_cost_falls_with_the_trade(b: int, exits_: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses, costs = torch.rand(b, exits_ + 1, generator=generator), torch.linspace(0.1, 1, exits_ + 1)
    before = float("inf")
    for trade in (0.0, 0.3, 1.0, 10.0):
        labels = exit_labels(losses, costs, trade)
        assert bool((labels.diff(dim=-1) >= 0).all())
        mean = float(costs[(1 - labels).sum(-1).long()].mean())
        assert mean <= before + 1e-6
        before = mean


@torch.no_grad()
def test_costs_are_those_of_runs(learned: Any) -> None:
    _, made = learned
    block, head = 2 * 2 * 12 * 24, 2 * 12 * 4
    gate = 2 * 4
    run = [(at + 1) * (block + head + gate) for at in range(3)]
    whole = 4 * block + 3 * (head + gate) + head
    assert exit_costs(made, task(0, 3)[0]).tolist() == pytest.approx([f / whole for f in [*run, whole]])


@torch.no_grad()
def test_exemplars_of_the_calibrated_rule() -> None:
    torch.manual_seed(0)
    x, y = task(3, 64)
    made = gatecc.transform(Rows().eval(), Exit("block[0]", rule="calibrated(exemplars=48)"), (x[:4],))
    with pytest.raises(ArgumentError, match="too few"):
        fit_exemplars(made, [(x[:8], y[:8])])
    fit_exemplars(made, [(x[:32], y[:32]), (x[32:], y[32:])])
    (rule,) = exits(made)
    assert torch.equal(rule.get_buffer("exemplars"), exit_logits(made, x)[0][:48])
    found = calibrate(made, [(x, y)], by="quantile", share=0.25)
    assert 0.2 < found.chosen.shares[0] < 0.45  # samples of one score leave together


def test_refused(learned: Any) -> None:
    model, made = learned
    x, y = task(0, 8)
    with pytest.raises(TrainingError, match="no exits"):
        calibrate(model, [(x, y)])
    with pytest.raises(TrainingError, match="exemplars"):
        fit_exemplars(made, [(x, y)])
    with pytest.raises(ArgumentError, match="shares in"):
        calibrate(made, [(x, y)], by="quantile", share=[0.5])
    with pytest.raises(ArgumentError, match="no samples"):
        calibrate(made, [])
    with pytest.raises(ArgumentError, match="as cheap"):
        calibrate(made, [(x, y)], by="cost", budget=0.01)
    with pytest.raises(ArgumentError, match="steps"):
        fit_exits(made, [(x, y)], steps=0)
