"""The model as a whole and its steps: sites whose values are the model's own inputs and outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import gatecc
from gatecc.ir.select import Selector
from tests.ir.match.found import Lambda, find

X = torch.randn(2, 3, 6)


class Pair(NamedTuple):
    mean: Tensor
    spread: tuple[Tensor]


def linear(result: Any, **parts: nn.Module) -> nn.Module:
    return Lambda(lambda m, x: result(m.a(x)), a=nn.Linear(6, 6), **parts)


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (lambda y: y, {"out"}),
        (lambda y: (y, y * 2), {"out0", "out1", "out"}),
        (lambda y: {"logits": y, "states": [y + 1, None, y + 2]}, {"logits", "states_0", "states_2", "out"}),
        (lambda y: Pair(y, (y * 2,)), {"mean", "spread_0", "out"}),
    ],
)
def test_outputs_have_the_names_that_the_model_gives(result: Any, names: set[str]) -> None:
    found = find(linear(result), X)
    (site,) = found.sites("model")
    assert set(site.values) == names | {"args"}
    assert found.axes(site) == dict.fromkeys(site.values, "bnc")
    assert torch.equal(found.value(site, "args"), X)
    with torch.no_grad():
        first = next(t for t in tree_leaves(found.program.module(X)) if isinstance(t, Tensor))
    torch.testing.assert_close(found.value(site, "out"), first)


def test_a_submodule_is_no_model() -> None:
    assert not find(linear(lambda y: y), X, fqn="encoder").sites("model")


def test_a_value_of_the_model_is_gated() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(x)}

    assert gatecc.Model.logits == gatecc.Model[...].logits == Selector.parse("model[...].logits")
    model = Classifier().eval()
    half = gatecc.GateSpec("param", "none", "scalar", "sigmoid", init="zero")
    with torch.no_grad():
        expected = model(X)["logits"] / 2
        got = gatecc.transform(model, gatecc.Gate(gatecc.Model.logits, half), (X,))(X)["logits"]
    torch.testing.assert_close(got, expected)


def test_stages_of_other_kinds_are_attributes_where_the_class_has_none_of_the_name() -> None:
    assert gatecc.MLP.out == gatecc.MLP[...].out
    for name in ("heads", "nothing"):  # a field of the class; no stage
        with pytest.raises(AttributeError):
            getattr(gatecc.Attention, name)


def diffusion(m: Any, x: Tensor, t: Tensor) -> Tensor:
    angles = t[:, None].float() * torch.exp(-torch.arange(3) * 2.0)
    return m.a(x) + m.b(torch.cat([angles.sin(), angles.cos()], -1))[:, None]


def rotary(m: Any, x: Tensor, positions: Tensor) -> Tensor:
    angles = positions[..., None].float() @ (torch.arange(1, 4) * 1.0)[None]
    return m.b(m.a(x) * torch.cat([angles, angles], -1).cos())


@pytest.mark.parametrize(
    ("function", "given", "name", "axes"),
    [
        (diffusion, torch.tensor([3, 7]), "time", "b"),
        (diffusion, torch.tensor([0.3, 0.7]), "time", "b"),
        (rotary, torch.arange(3).expand(2, 3).contiguous(), "position", "bn"),
        (rotary, torch.arange(3), "position", "n"),
    ],
)
def test_the_time_or_the_positions_of_a_step(function: Any, given: Tensor, name: str, axes: str) -> None:
    found = find(Lambda(function, a=nn.Linear(6, 6), b=nn.Linear(6, 6)), X, given)
    (site,) = found.sites("step")
    assert found.axes(site) == {name: axes, "out": "bnc"}
    assert torch.equal(found.value(site, name), given)


def test_what_is_learned_of_an_input_is_no_time() -> None:
    """Sines of a projection (SIREN) and a label that a table is read at say nothing about steps."""
    siren = Lambda(lambda m, x, t: m.a(x) + m.b(t[:, None]).sin()[:, None], a=nn.Linear(6, 6), b=nn.Linear(1, 6))
    assert not find(siren, X, torch.rand(2)).sites("step")
    label = Lambda(lambda m, x, y: (m.a(x) + m.b(y)[:, None]).sin(), a=nn.Linear(6, 6), b=nn.Embedding(9, 6))
    assert not find(label, X, torch.tensor([1, 2])).sites("step")
