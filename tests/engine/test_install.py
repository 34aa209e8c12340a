"""Layers that share a captured graph: what a rewrite reads of its layer is that layer's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError
from gatecc.ir.contract import Contract, changes_function
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.site import Site
from gatecc.scope.state import scopes


class FF(nn.Module):
    """One residual feed-forward layer with a buffer of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x))) + self.get_buffer("shift")


class Net(nn.Module):
    """Three layers of one structure."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FF(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Held(nn.Module):
    """Adds a tensor that it holds."""

    def __init__(self, held: Tensor) -> None:
        super().__init__()
        self.held = nn.Parameter(held)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.held.mean()


X = torch.randn(2, 5, 8)
Take = Callable[[Site, Editor], Tensor]
ORIGINAL: list[Net] = []  # what a closure over the user's own model sees


def _weight(site: Site, edit: Editor) -> Tensor:
    return edit.program.module.get_parameter(edit.program.relative_name(site.weights["up"].fqn)).detach().clone()


def _name(site: Site, edit: Editor) -> Tensor:
    return torch.tensor([float(site.owner.split(".")[1])])


TAKES: dict[str, tuple[Take, Callable[[Net, int], Tensor]]] = {
    "a weight": (_weight, lambda net, i: net.get_parameter(f"layers.{i}.up.weight")),
    "a buffer": (
        lambda site, edit: edit.program.module.get_buffer("shift").clone(),
        lambda net, i: net.get_buffer(f"layers.{i}.shift"),
    ),
    "a weight of the user's model by its FQN": (
        lambda site, edit: ORIGINAL[0].get_parameter(site.weights["down"].fqn).detach().clone(),
        lambda net, i: net.get_parameter(f"layers.{i}.down.weight"),
    ),
    "the name": (_name, lambda net, i: torch.tensor([float(i)])),
}


@dataclass(frozen=True)
class Holding(gatecc.Rewrite):
    """Adds the mean of something that is read from the layer: ``at`` says what, ``early`` before or in the builder."""

    name = "holding"
    at: str = "a weight"
    early: bool = False

    def contract(self) -> Contract:
        return changes_function()

    def rewrite(self, site: Site, edit: Editor) -> None:
        take, _ = TAKES[self.at]
        early = take(site, edit)
        path = edit.module("held", lambda: Held(early if self.early else take(site, edit)))
        edit.replace(site.values["in"].node, edit.call(path, site.values["in"].node))


@pytest.fixture(scope="module")
def net() -> Net:
    ORIGINAL[:] = [Net().eval()]
    return ORIGINAL[0]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("at", TAKES)
def test_a_builder_reads_its_own_layer(net: Net, at: str, early: bool) -> None:
    result = gatecc.transform(net, Holding(gatecc.MLP[...], at, early), (X,), verify=False)
    for i in range(3):
        assert torch.equal(result.get_parameter(f"layers.{i}.held.held"), TAKES[at][1](net, i))
    assert len({id(state.family) for _, _, state in scopes(result)}) == 1  # one graph still


def test_the_calls_of_each_layer_are_its_own(net: Net) -> None:
    def take(site: Site, edit: Editor) -> Tensor:
        return edit.program.example[0].clone()

    TAKES["the call"] = (take, lambda net, i: X)
    calls: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, args: calls.append(args[0])) for layer in net.layers]
    net(X)
    for handle in handles:
        handle.remove()
    result = gatecc.transform(net, Holding(gatecc.MLP[...], "the call"), (X,), verify=False)
    for i in range(3):
        assert torch.allclose(result.get_parameter(f"layers.{i}.held.held"), calls[i])


@dataclass(frozen=True)
class Baked(gatecc.Rewrite):
    """Divides by the norm of a weight, which becomes a constant of the graph."""

    name = "baked"

    def contract(self) -> Contract:
        return changes_function()

    def rewrite(self, site: Site, edit: Editor) -> None:
        norm = float(_weight(site, edit).norm())
        out = site.values["out"].node
        edit.replace(out, edit.call(torch.div, out, norm))


def test_a_constant_of_the_graph_is_that_of_its_layer(net: Net) -> None:
    result = gatecc.transform(net, Baked(gatecc.MLP[...]), (X,))
    expected = X
    for layer in net.layers:
        assert isinstance(layer, FF)
        branch = layer.down(torch.relu(layer.up(expected)))
        expected = expected + branch / layer.up.weight.norm() + layer.get_buffer("shift")
    assert torch.allclose(result(X), expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(result(X[:1]), expected[:1], atol=1e-5)
    pairs = gatecc.last_report(result).graphs
    assert [pair.scopes for pair in pairs] == [("layers.0",), ("layers.1",), ("layers.2",)]
    plain = gatecc.revert(result)
    assert torch.equal(plain(X), net(X))


@dataclass(frozen=True)
class Filled(gatecc.Rewrite):
    """Says what it fills its module from, and is done once for all layers."""

    name = "filled"

    def effects(self) -> Effects:
        return Effects(same_for_layers=True)

    def contract(self) -> Contract:
        return changes_function()

    def rewrite(self, site: Site, edit: Editor) -> None:
        DONE.append(site.owner)
        edit.replace(
            site.values["in"].node, edit.call(edit.module("held", self.build, self.fill), site.values["in"].node)
        )

    @staticmethod
    def build() -> nn.Module:
        return Held(torch.zeros(16, 8))

    @staticmethod
    def fill(new: Any, layer: nn.Module) -> None:
        new.held.copy_(layer.get_parameter("up.weight"))


DONE: list[str] = []


def test_a_module_is_filled_from_its_own_layer(net: Net) -> None:
    DONE.clear()
    result = gatecc.transform(net, Filled(gatecc.MLP[...]), (X,), verify=False)
    assert DONE == ["layers.0"]
    for i in range(3):
        assert torch.equal(result.get_parameter(f"layers.{i}.held.held"), net.get_parameter(f"layers.{i}.up.weight"))


def test_the_promise_of_a_class_is_not_that_of_a_subclass() -> None:
    @dataclass(frozen=True)
    class Mine(gatecc.Gate):
        pass

    @dataclass(frozen=True)
    class Sure(Mine):
        def effects(self) -> Effects:
            return replace(super().effects(), same_for_layers=True)

    gate = gatecc.GateSpec("self", "linear", "token", "sigmoid")
    promised = [cls(gatecc.MLP[...].out, gate).effects() for cls in (gatecc.Gate, Mine, Sure)]
    assert [effects.same_for_layers for effects in promised] == [True, False, True]


def test_a_new_module_on_the_memory_of_a_weight_is_refused(net: Net) -> None:
    TAKES["a view"] = (lambda site, edit: edit.program.module.get_parameter("up.weight").data[:4], lambda net, i: X)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    target = net
    with pytest.raises(ArgumentError, match=r"memory of up\.weight"):
        gatecc.transform(target, Holding(gatecc.MLP[...], "a view"), (X,), inplace=True, verify=False)
    assert all(torch.equal(before[name], p) for name, p in target.state_dict().items())
    assert list(scopes(target)) == []


def test_after_an_error_at_a_later_layer_the_model_is_as_before(net: Net) -> None:
    def take(site: Site, edit: Editor) -> Tensor:
        if "2" in site.owner:
            raise KeyError("no such layer")
        return torch.zeros(1)

    TAKES["breaks"] = (take, lambda net, i: X)
    with pytest.raises(gatecc.GateccError, match="KeyError"):
        gatecc.transform(net, Holding(gatecc.MLP[...], "breaks"), (X,), inplace=True, verify=False)
    assert not [name for name, _ in net.named_parameters() if "held" in name]
    assert list(scopes(net)) == []
