"""Calibration inputs say which hidden neurons fire together; experts are made of these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError
from gatecc.passes.route.split import Split, decoded
from gatecc.train import coactivation


class Quarters(nn.Module):
    """x: (B, N, 8). The hidden neurons fire for one of four kinds of tokens each; no two neighbours for the same."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        with torch.no_grad():
            self.up.weight.zero_()
            for neuron in range(24):
                self.up.weight[neuron, neuron % 4] = 1 + neuron / 24

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_neurons_that_fire_for_the_same_tokens_become_an_expert() -> None:
    torch.manual_seed(0)
    model = Quarters().eval()
    batches = [torch.eye(8)[torch.randint(4, (2, 50))] for _ in range(3)]
    measured = coactivation(model, batches, 4, layers=("do*",), share=0.25, tokens=250, neighbours=5)
    chosen = decoded(measured.coded[0])
    assert measured.layers == ("down",)
    assert [len(set(chosen[kind::4].tolist())) for kind in range(4)] == [1, 1, 1, 1]
    assert sorted(torch.bincount(chosen).tolist()) == [6, 6, 6, 6]
    assert not model.down._forward_pre_hooks

    split = gatecc.transform(model, gatecc.recipe("split-experts", experts=4, by=measured), (batches[0],), verify=False)
    with torch.no_grad():
        assert float((split(batches[0]) - model(batches[0])).abs().max()) < 1e-6
    experts: Any = split.get_submodule("experts")
    assert sorted(int(rows.abs().sum(0).argmax()) for rows in experts.gate_up_proj) == [0, 1, 2, 3]
    assert str(Split.parse(str(Split(4, measured)))) == str(Split(4, measured))


def test_what_cannot_be_measured_is_refused() -> None:
    model = Quarters()
    with pytest.raises(ArgumentError, match="no layers to measure"):
        coactivation(model, [torch.randn(1, 3, 8)], 4, layers=("*.down_proj",))
    with pytest.raises(ArgumentError, match="down: the layer was not called"):
        coactivation(model, [], 4, layers=("down",))
    with pytest.raises(ArgumentError, match="24 hidden neurons, 5 groups"):
        coactivation(model, [torch.randn(1, 3, 8)], 5, layers=("down",))
    assert model.training
