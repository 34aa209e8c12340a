"""Calls with several results: a router yields weights, indices and a loss, in a graph, in Python, and for hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.ir.contract import Contract, changes_function
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.site import Site
from gatecc.scope.state import scopes

X = torch.randn(2, 3, 4)


class FF(nn.Module):
    """A feed-forward layer; ``note`` is passed by."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, note: object = None) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FF() for _ in range(2))

    def forward(self, x: Tensor, note: object = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, note)
        return x


class Router(nn.Module):
    """Weights and indices of the best two of three experts, a loss that keeps them even, and what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores = self.score(x).softmax(-1)
        weights, indices = scores.topk(2)
        return weights, indices, scores.mean((0, 1)).square().sum(), x


def weighted(out: Tensor, weights: Tensor, indices: Tensor, loss: Tensor, read: Tensor) -> Tensor:
    """Something of each of the results."""
    return out * weights.sum(-1, keepdim=True) + indices.sum(-1, keepdim=True) + loss + read


@dataclass(frozen=True)
class Routed(gatecc.Rewrite):
    name = "routed"

    def effects(self) -> Effects:
        return Effects(same_for_layers=True)

    def contract(self) -> Contract:
        return changes_function()

    def reads(self) -> tuple[str, ...]:
        return ("in", "out")

    def rewrite(self, site: Site, edit: Editor) -> None:
        given, out = (site.values[name].node for name in ("in", "out"))
        results = edit.call(edit.module("router", Router), given)
        assert len(results) == 4
        edit.replace(out, edit.call(weighted, out, *results))


def expected(model: nn.Module, indices: int = 0) -> Tensor:
    """The model with its routers in Python; ``indices`` is added to theirs."""
    x = X
    for layer in model.get_submodule("layers").children():
        found: list[Tensor] = list(layer.get_submodule("router")(x))
        found[1] = found[1] + indices
        out = layer.get_submodule("down")(torch.relu(layer.get_submodule("up")(x)))
        x = x + weighted(out, found[0], found[1], found[2], found[3])
    return x


@pytest.fixture(scope="module")
def routed() -> nn.Module:
    torch.manual_seed(0)
    return gatecc.transform(Net().eval(), Routed(gatecc.MLP[...]), (X,))


def test_a_graph_reads_each_of_them(routed: nn.Module) -> None:
    assert torch.allclose(routed(X), expected(routed), atol=1e-6)
    routed(X).sum().backward()
    grad = routed.get_parameter("layers.0.router.score.weight").grad
    assert grad is not None
    assert grad.abs().sum() > 0


def test_a_call_that_is_no_graph_does_too(routed: nn.Module) -> None:
    assert [state.python.refused for _, _, state in scopes(routed)] == ["", ""]
    assert torch.allclose(routed(X, object()), expected(routed), atol=1e-6)


def test_a_hook_sees_the_tuple_and_may_change_it(routed: nn.Module) -> None:
    seen: list[Any] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        seen.append(output)
        weights, indices, loss, read = output
        return weights, indices + 1, loss, read

    handles = [routed.get_submodule(f"layers.{i}.router").register_forward_hook(hook) for i in range(2)]
    found = routed(X)
    for handle in handles:
        handle.remove()
    assert [type(output) for output in seen] == [tuple, tuple]
    assert [x.shape for x in seen[0]] == [(2, 3, 2), (2, 3, 2), (), (2, 3, 4)]
    assert torch.equal(seen[0][3], X)
    assert torch.allclose(found, expected(routed, indices=1), atol=1e-6)
    assert torch.allclose(routed(X), expected(routed), atol=1e-6)


def test_they_are_compiled(routed: nn.Module) -> None:
    compiled = torch.compile(routed, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(X), expected(routed), atol=1e-6)


def worded(x: Tensor) -> Any:
    return x * 2, "twice"


@dataclass(frozen=True)
class Wordy(Routed):
    name = "wordy"

    def rewrite(self, site: Site, edit: Editor) -> None:
        edit.call(worded, site.values["in"].node)


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(gatecc.GateccError, match="str"):
        gatecc.transform(Net().eval(), Wordy(gatecc.MLP[...]), (X,))
