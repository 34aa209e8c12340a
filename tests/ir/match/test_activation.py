"""Activation sites, and the written-out functions that gatecc.ir.match.nonlinearity recognises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ir.match.found import Lambda, find

OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
    "elu": F.elu,
    "mish": F.mish,
}

WRITTEN: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "falcon": ("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "halved last": ("gelu", lambda x: 0.5 * (x * (1 + torch.erf(x * 0.7071067811865475)))),
    "gpt2": ("gelu", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))),
    "bloom": ("gelu", lambda x: x * 0.5 * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))),
    "swish": ("silu", lambda x: x * torch.sigmoid(x)),
    "quick gelu": ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "mish": ("mish", lambda x: x * torch.tanh(F.softplus(x))),
    "hardswish": ("hardswish", lambda x: x * F.relu6(x + 3) / 6),
    "squared relu": ("squared_relu", lambda x: F.relu(x) ** 2),
}


def between_linears(function: Callable[[Any], Any]) -> nn.Module:
    return Lambda(lambda m, x: m.b(function(m.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 6))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str) -> None:
    found = find(between_linears(OPERATORS[name]), torch.randn(2, 3, 6))
    (site,) = found.sites("activation")
    assert site.function == name
    torch.testing.assert_close(OPERATORS[name](found.value(site, "in")), found.value(site, "out"))


@pytest.mark.parametrize("name", WRITTEN)
def test_written_out(name: str) -> None:
    function, form = WRITTEN[name]
    found = find(between_linears(form), torch.randn(2, 3, 6))
    (site,) = found.sites("activation")  # the tanh inside is no site of its own
    assert site.function == function
    torch.testing.assert_close(form(found.value(site, "in")), found.value(site, "out"))
    assert found.sites("mlp")[0].activation == function


def test_what_is_nearly_a_gelu_is_not_called_one() -> None:
    found = find(between_linears(lambda x: x * 0.5 * (1.0 + torch.erf(x / 2.0))), torch.randn(2, 3, 6))
    assert found.sites("activation") == []


def test_a_tanh_that_is_read_inside_is_a_tanh() -> None:
    def shared(x: Tensor) -> Tensor:
        t = torch.tanh(F.softplus(x))
        return x * t + t

    found = find(between_linears(shared), torch.randn(2, 3, 6))
    assert [site.function for site in found.sites("activation")] == ["softplus", "tanh"]


def test_in_place_forms() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.SiLU(inplace=True))
    found = find(model, torch.randn(2, 3, 6))
    assert [(site.function, site.owner) for site in found.sites("activation")] == [("relu", "1"), ("silu", "3")]


def test_activations_of_constants_are_none() -> None:
    found = find(Lambda(lambda m, x: x * torch.sigmoid(m.w), w=nn.Parameter(torch.randn(6))), torch.randn(2, 3, 6))
    assert not found.sites("activation")


def test_a_softcap_is_its_tanh() -> None:
    found = find(between_linears(lambda x: 30 * torch.tanh(x / 30)), torch.randn(2, 3, 6))
    assert [site.function for site in found.sites("activation")] == ["tanh"]


def test_features_before_tokens_as_mamba_has_them() -> None:
    """``weight @ x`` and a half of a product keep the axis of the features, which is not the last one."""

    def form(m: Any, x: torch.Tensor) -> torch.Tensor:
        one, two = F.linear(x, m.w).transpose(1, 2).chunk(2, dim=1)  # (B, C, N) each
        return F.silu(one) + F.softplus(m.v @ two)

    found = find(
        Lambda(form, w=nn.Parameter(torch.randn(16, 6)), v=nn.Parameter(torch.randn(8, 8))), torch.randn(2, 5, 6)
    )
    assert [(s.function, str(s.values["out"].axes)) for s in found.sites("activation")] == [
        ("silu", "bcn"),
        ("softplus", "bcn"),
    ]
