"""CGIB: the blend with noise and the price of information, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import gatecc
from gatecc.errors import ArgumentError
from gatecc.passes.noise_gate import NoiseGate, information
from tests.recipes.checks import agree, case, new_parameters, randomise, reverted
from tests.recipes.tiny import reference, tiny

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(8))


def test_a_node_gives_way_to_the_mean_of_its_sample() -> None:
    plain = tiny()
    model: Any = gatecc.transform(plain, gatecc.recipe("cgib", scorer="linear"), (X,), verify=False)
    gates = new_parameters(model, plain)
    randomise(gates.values())
    weight, bias = gates.values()

    def at(place: str, layer: int, value: Tensor, **_: Tensor) -> Tensor:
        if place != "after" or layer != 1:
            return value
        on = torch.sigmoid(value @ weight.T + bias)
        return on * value + (1 - on) * value.mean(1, keepdim=True)

    assert agree(model, reference(plain, at), X) <= 1e-6
    with torch.no_grad():
        weight.zero_()
        bias.fill_(-40.0)
    out = model(X)
    assert torch.allclose(out, out.mean(1, keepdim=True).expand_as(out), atol=1e-5), "nothing of a node is left"
    bias.data.fill_(40.0)
    assert agree(model, plain, X) <= 1e-6, "everything is left"
    reverted(model, plain, (X,))


def test_the_price_is_the_divergence_from_the_noise() -> None:
    h, mean, std = X, X.mean(1, keepdim=True), X.std(1, keepdim=True, correction=0)
    on = torch.rand(2, 6, 1, generator=torch.Generator().manual_seed(1))
    own = Normal(on * h + (1 - on) * mean, (1 - on) * std)
    assert torch.allclose(information(h, on, mean, std), kl_divergence(own, Normal(mean, std)).mean(), atol=1e-5)
    assert float(information(h, torch.zeros_like(on), mean, std)) == pytest.approx(0, abs=1e-6)


def test_training_draws_noise_and_pays() -> None:
    plain = tiny()
    model: Any = gatecc.transform(plain, gatecc.recipe("cgib", beta=0.5, start=0.0), (X,), verify=False).train()
    assert not torch.equal(model(X), model(X))
    new = new_parameters(model, plain)
    (model(X) * 0).sum().backward()
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in new.values()), "the price alone trains it"
    (losses,) = gatecc.aux_losses(model).values()
    assert float(losses["kl"]) > 0
    before = float(losses["kl"])
    optimizer = torch.optim.Adam(new.values(), 0.1)
    for _ in range(10):
        optimizer.zero_grad()
        (model(X) * 0).sum().backward()
        optimizer.step()
    gates = [m for n, m in model.named_modules() if n.endswith("noise")]
    gates[0].loss_kl.zero_()
    model(X)
    (losses,) = gatecc.aux_losses(model).values()
    assert float(losses["kl"]) < before, "without a task nothing is worth its price"


@pytest.mark.parametrize("name", ["hf/bert-sdpa", "hf/vit-sdpa"])
def test_real_models(name: str) -> None:
    known = case(name)
    model = gatecc.transform(known.model, gatecc.recipe("cgib", start=30.0), known.inputs)
    new = new_parameters(model, known.model)
    assert new
    reverted(model, known.model, known.inputs.args, known.inputs.kwargs)


def test_a_price_below_zero_is_none() -> None:
    with pytest.raises(ArgumentError, match="price"):
        NoiseGate("block[...].out", gatecc.GateSpec("self", "linear", "token"), beta=-1.0)
