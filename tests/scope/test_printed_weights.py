"""Where a printed graph reads its weights: the dicts of the modules, or what stands in the way of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, fx, nn

from gatecc.capture import capture
from gatecc.scope.printed_weights import Weights
from gatecc.scope.variant import Variant


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Odd(nn.Module):
    """A weight in each place in which a module may keep one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a-b": nn.Linear(4, 4), "0": nn.BatchNorm1d(4)})
        self.plain = torch.ones(4)
        self.made: Any = parametrize.register_parametrization(nn.Linear(4, 4), "weight", Twice())

    @property
    def halved(self) -> Tensor:
        return self.plain / 2


PATHS = ["inner.a-b.weight", "inner.0.running_mean", "inner.a-b.bias", "plain", "made.weight", "halved"]


def test_every_place_is_read_when_called() -> None:
    module: Any = Odd()
    weights = Weights(module, PATHS)
    for change in (lambda: None, lambda: module.inner["a-b"].weight.data.zero_(), lambda: swapped(module)):
        change()
        expected = [module.inner["a-b"].weight, module.inner["0"].running_mean, module.inner["a-b"].bias]
        expected += [module.plain, module.made.weight, module.halved]
        for read in (weights, weights.by_attribute, weights.from_dicts):
            assert all(torch.equal(a, b) for a, b in zip(read(module), expected, strict=True))
    assert len(set(weights.names)) == len(PATHS)
    assert all(name.isidentifier() for name in weights.names)


def swapped(module: Any) -> None:
    module.inner["a-b"] = nn.Linear(4, 4)
    module.plain = torch.full((4,), 3.0)
    with torch.no_grad():
        module.made.parametrizations.weight.original.fill_(0.5)


def test_a_tracer_of_attributes_gets_attributes() -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    weights = Weights(module, ["0.weight"])

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = module

        def forward(self, x: Tensor) -> Tensor:
            return x @ weights(self.inside)[0]

    graph = fx.Tracer().trace(Root())
    assert [str(n.target) for n in graph.nodes if n.op == "get_attr"] == ["inside.0.weight"]


@pytest.mark.parametrize("training", [True, False])
def test_dropout_runs_in_training_alone(training: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).train(training)
    x = torch.randn(3, 8)
    variant = Variant(capture(model, (x,)))
    assert ("aten.dropout" in variant.source) is training
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(variant(model, [x]), expected)
