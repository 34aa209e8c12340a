"""Rows in a weight that the model did not have."""

from __future__ import annotations

import torch
from torch import nn

from gatecc.ir.widen import Rows, narrow, widen

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
