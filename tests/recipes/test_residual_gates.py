"""Gated residual joins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from tests.recipes.checks import agree, case, causal, new_parameters, randomise, reverted, zoo
from tests.recipes.tiny import reference, tiny

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(5))


def _gate(model: nn.Module, join: int) -> Any:
    return model.get_submodule(f"blocks.{join // 2}.gate" + ("_1" if join % 2 else ""))


def _input(model: nn.Module, on: str) -> Any:
    def at(place: str, join: int, value: Tensor, **seen: Tensor) -> Tensor:
        gate = _gate(model, join) if place == on else None
        return value if gate is None else value * 2 * torch.sigmoid(value @ gate.weight.T + gate.bias)

    return at


def _scalar(model: nn.Module, on: str) -> Any:
    def at(place: str, join: int, value: Tensor, **seen: Tensor) -> Tensor:
        return value * _gate(model, join).weight if place == on else value

    return at


def _coupled(model: nn.Module, scale: float) -> Any:
    def at(place: str, join: int, value: Tensor, **seen: Tensor) -> Tensor:
        if place != "join":
            return value
        g = torch.sigmoid(seen["skip"] @ _gate(model, join).weight.T + _gate(model, join).bias)
        return scale * (g * seen["skip"] + (1 - g) * seen["branch"])

    return at


@pytest.mark.parametrize("on", ["skip", "branch"])
@pytest.mark.parametrize("join", ["scalar", "input"])
def test_gates_on_one_side(join: str, on: str) -> None:
    plain = tiny(causal=True)
    model = gatecc.transform(plain, gatecc.recipe("residual-gates", join=join, on=on), (X,), verify=False)
    assert agree(model, plain, X) == 0
    randomise(new_parameters(model, plain).values())
    by_hand = reference(plain, (_scalar if join == "scalar" else _input)(model, on))
    assert agree(model, by_hand, X) <= 1e-6 < agree(model, plain, X)
    assert causal(model, X, 3)
    reverted(model, plain, (X,))


@pytest.mark.parametrize(("init", "scale"), [("identity", 2.0), ("half", 1.0)])
def test_coupled_joins(init: str, scale: float) -> None:
    plain = tiny()
    model = gatecc.transform(plain, gatecc.recipe("residual-gates", join="coupled", init=init), (X,), verify=False)
    average = reference(plain, lambda place, _, value, **seen: value / 2 if place == "join" else value)
    assert agree(model, plain if scale == 2 else average, X) <= 1e-6
    randomise(new_parameters(model, plain).values())
    assert agree(model, reference(plain, _coupled(model, scale)), X) <= 1e-6
    reverted(model, plain, (X,))


def test_an_additive_join_is_the_original_and_trains_nothing() -> None:
    plain = tiny()
    model = gatecc.transform(plain, gatecc.recipe("residual-gates", join="additive"), (X,), verify=False)
    assert agree(model, plain, X) == 0
    assert not any(p.requires_grad for p in new_parameters(model, plain).values())


@pytest.mark.broad(2)
@pytest.mark.parametrize(
    ("name", "options", "export"),
    [
        ("hf/gpt2-eager", {"join": "input"}, True),
        ("hf/bert-sdpa", {"join": "coupled"}, False),
        ("torchvision/resnet18", {"join": "coupled", "granularity": "scalar"}, True),
        ("torchvision/resnet18", {"join": "scalar", "on": "branch"}, False),
    ],
)
def test_real_models(name: str, options: dict[str, Any], export: bool) -> None:
    zoo(name, "residual-gates", export=export, **options)


def test_the_model_keeps_its_own_branch_where_the_skip_is_gated() -> None:
    known = case("hf/gpt2-eager")
    model: Any = gatecc.transform(
        known.model,
        gatecc.recipe("residual-gates", join="scalar", sites="residual[0]"),
        known.inputs,
        verify=False,
    )
    gate = next(iter(new_parameters(model, known.model).values()))
    seen: list[Tensor] = []
    norm = known.model.get_submodule("transformer.h.0.ln_1")
    with torch.no_grad():
        gate.fill_(0.0)
        with norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
            known.model(*known.args, **known.kwargs)
    assert float(seen[0].abs().max()) > 0, "the branch reads the whole stream"
    assert not torch.equal(model(*known.args, **known.kwargs).logits, known.model(*known.args, **known.kwargs).logits)
