"""Calls without gradients run the graph that was captured with them, where it is proved to be the same function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.scope.state import scopes


class Mlp(nn.Module):
    """A feed-forward network that does something of its own at the end."""

    def __init__(self, last: Callable[[Mlp, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.act = nn.GELU()
        self.twice = False
        self.last = last

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.last(self, self.down(self.act(self.up(x))), seen)


class Net(nn.Module):
    """Two layers; ``seen`` is a tensor that a layer may change."""

    def __init__(self, last: Callable[[Mlp, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mlp(last), Mlp(last)])

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, seen)
        return x


def alike(mlp: Mlp, y: Tensor, seen: Tensor) -> Tensor:
    return y + seen


def in_place(mlp: Mlp, y: Tensor, seen: Tensor) -> Tensor:
    return y + seen.add_(1)


def other_value(mlp: Mlp, y: Tensor, seen: Tensor) -> Tensor:
    return y if torch.is_grad_enabled() else 3 * y


def other_attribute(mlp: Mlp, y: Tensor, seen: Tensor) -> Tensor:
    return y if torch.is_grad_enabled() or not mlp.twice else 2 * y


def gradients_all_the_same(mlp: Mlp, y: Tensor, seen: Tensor) -> Tensor:
    with torch.enable_grad():
        return y * mlp.down.bias


@pytest.mark.parametrize(
    ("last", "shared"),
    [(alike, True), (in_place, True), (other_value, False), (other_attribute, False), (gradients_all_the_same, False)],
)
def test_sharing_is_proved(last: Callable[[Mlp, Tensor, Tensor], Tensor], shared: bool) -> None:
    plain = Net(last).eval()
    x = torch.randn(2, 5, 8)
    gate = gatecc.Gate(gatecc.MLP[...].out, gatecc.GateSpec("in"))
    model = gatecc.transform(plain, gate, (x, torch.ones(8)), verify=False)
    with torch.no_grad():
        for flag in (False, True):
            for layer in (*plain.layers, *model.get_submodule("layers").children()):
                vars(layer)["twice"] = flag
            seen, expected = torch.zeros(8), torch.zeros(8)
            assert torch.allclose(model(x, seen), plain(x, expected), atol=1e-6)
            assert torch.equal(seen, expected), "proofs run on copies of the inputs"
    for _, _, state in scopes(model):
        calls = {key[1]: {id(e.variant) for e in entries} for key, entries in state.family.entries.items()}
        assert (calls[False] <= calls[True]) == shared
    layer, its = (m.get_submodule("layers.0") for m in (model, plain))
    with torch.no_grad():
        assert layer(x, torch.zeros(8)).requires_grad == its(x, torch.zeros(8)).requires_grad
