"""Weights that hold new rows, and the model without them for a while."""

from __future__ import annotations

import torch
from torch import nn

from gatecc.ir.widen import Rows, narrow, widen
from gatecc.scope.widened import narrowed

ROWS = Rows(groups=2, old=3, new=1)


def _wide() -> tuple[nn.Module, nn.Parameter, torch.Tensor]:
    model = nn.Sequential(nn.Linear(4, 6))
    weight = model.get_parameter("0.weight")
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    widen(model, "0.weight", ROWS, torch.full((2, 4), 7.0))
    widen(model, "0.bias", ROWS, torch.zeros(2))
    return model, weight, before


def test_the_parameter_stays_the_same_object() -> None:
    model, weight, before = _wide()
    linear = model.get_submodule("0")
    assert linear.get_parameter("weight") is weight
    assert weight.shape == (8, 4)
    assert weight.grad is None
    assert linear.out_features == 8
    assert model(torch.zeros(3, 4)).shape == (3, 8)
    assert bool((weight[3::4] == 7).all())
    narrow(model, "0.weight", ROWS)
    assert torch.equal(weight, before)
    assert linear.out_features == 6


def test_the_own_forward_sees_its_own_rows() -> None:
    model, weight, before = _wide()
    x = torch.randn(3, 4)
    with narrowed(model, {"0.weight": ROWS, "0.bias": ROWS}):
        inside = model.get_submodule("0").get_parameter("weight")
        assert torch.equal(inside, before)
        assert inside is not weight
        assert torch.equal(model(x), nn.functional.linear(x, before, model.get_submodule("0").get_parameter("bias")))
    assert model.get_submodule("0").get_parameter("weight") is weight


def test_an_error_inside_brings_the_rows_back() -> None:
    model, weight, _ = _wide()
    try:
        with narrowed(model, {"0.weight": ROWS}):
            raise KeyError
    except KeyError:
        pass
    assert model.get_submodule("0").get_parameter("weight") is weight
