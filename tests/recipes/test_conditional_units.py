"""Estimators of gradients through hard decisions, on units that are on or off for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from gatecc.train import set_reward
from tests.recipes.checks import agree, new_parameters, randomise, reverted, zoo
from tests.recipes.tiny import reference, tiny

X = torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(12))


def _units(estimator: str, **options: Any) -> tuple[Any, Any]:
    plain = tiny()
    model = gatecc.transform(
        plain,
        gatecc.recipe("conditional-units", estimator=estimator, scorer="linear", **options),
        (X,),
        verify=False,
    )
    return plain, model


def test_hard_units_are_the_units_written_by_hand() -> None:
    plain, model = _units("st")
    assert agree(model, plain, X) == 0, "every unit is on"
    randomise(new_parameters(model, plain).values())
    seen: list[float] = []

    def at(place: str, layer: int, value: Tensor, **given: Tensor) -> Tensor:
        if place != "hidden":
            return value
        gate = model.blocks[layer].mlp.gate
        on = torch.sigmoid(given["x"] @ gate.weight.T + gate.bias) > 0.5
        seen.append(float(on.float().mean()))
        return value * on

    assert agree(model, reference(plain, at), X) <= 1e-6
    assert all(0.2 < part < 0.8 for part in seen)
    reverted(model, plain, (X,))


@pytest.mark.parametrize(
    "estimator", ["st", "st(to=logit)", "gumbel(T=0.5, discrete=True)", "times_smooth", "noise(std=0.5)"]
)
def test_the_gater_learns_through_each_estimator(estimator: str) -> None:
    """Half of the tokens should give 0: the units learn to switch off for them."""
    plain, model = _units(estimator)
    new = new_parameters(model, plain)
    for p in plain.parameters():
        p.requires_grad_(False)
    wanted = (X[..., :1] > 0).float()
    for name, p in model.named_parameters():
        p.requires_grad_(name in new)
    model.train()
    optimiser = torch.optim.Adam(new.values(), 0.2)
    losses: list[float] = []
    for _ in range(25):
        loss = ((model(X) - plain(X) * wanted) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in new.values())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_reinforce_takes_the_loss_of_each_sample() -> None:
    plain, model = _units("reinforce(baseline=leave_one_out)")
    randomise(new_parameters(model, plain).values(), 0.2)
    model.train()
    out = model(X)
    loss = (out**2).mean((1, 2))
    set_reward(model, loss.detach())
    loss.mean().backward()
    gate = model.blocks[0].mlp.gate
    assert float(gate.weight.grad.abs().sum()) > 0
    assert bool(gate.weight.grad.isfinite().all())


def test_supervised_units_learn_which_units_carry_the_mass() -> None:
    plain, model = _units("supervised(label=topk_mass(r=0.5))")
    gates = [block.mlp.gate for block in model.blocks]
    optimiser = torch.optim.Adam([p for g in gates for p in g.parameters()], 0.3)
    model.train()
    for _ in range(30):
        optimiser.zero_grad()
        model(X).sum().mul(0.0).backward()  # the task says nothing: the labels do
        optimiser.step()
    model.eval()
    on = gates[0](torch.zeros(8, 6, 48), plain.blocks[0].norm2(X))
    assert 0.05 < float(on.mean()) < 0.95


def test_sampling_in_training_and_deciding_in_eval() -> None:
    _, model = _units("st", init="zero")
    model.train()
    a, b = model(X), model(X)
    assert not torch.equal(a, b), "units are drawn anew"
    model.eval()
    assert torch.equal(model(X), model(X))


@pytest.mark.parametrize(("name", "export"), [("hf/bert-sdpa", True), ("hf/gpt2-eager", False)])
def test_real_models(name: str, export: bool) -> None:
    known_options: dict[str, Any] = {"estimator": "noise(std=0.5)"}
    zoo(name, "conditional-units", export=export, tolerance=2e-2, **known_options)
