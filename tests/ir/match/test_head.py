"""Head sites: the projection behind an output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.ir.match.found import Lambda, find

X = torch.randn(2, 5, 6)


def test_logits_through_slices_casts_and_a_softcap() -> None:
    def model(m: Any, x: Tensor) -> Tensor:
        return 30 * torch.tanh(m.head(m.norm(m.body(x)))[:, -1:].float() / 30)

    found = find(Lambda(model, body=nn.Linear(6, 6), norm=nn.LayerNorm(6), head=nn.Linear(6, 9)), X)
    assert found.owners("head") == ["head"]


def test_one_head_an_output() -> None:
    found = find(Lambda(lambda m, x: (m.b(x).log_softmax(-1), m.a(x)), a=nn.Linear(6, 3), b=nn.Linear(6, 4)), X)
    assert sorted(found.owners("head")) == ["a", "b"]


def test_two_outputs_of_one_head_are_one_site() -> None:
    found = find(Lambda(lambda m, x: m.a(x).split(1, -1), a=nn.Linear(6, 2)), X)
    assert found.owners("head") == ["a"]


def test_averaged_heads_are_two_sites() -> None:
    found = find(Lambda(lambda m, x: (m.a(x) + m.b(x)) / 2, a=nn.Linear(6, 3), b=nn.Linear(6, 3)), X)
    assert found.owners("head") == ["a", "b"]


def test_a_model_without_a_head_is_refused_once() -> None:
    found = find(Lambda(lambda m, x: (m.norm(x + m.a(x)), x.mean()), a=nn.Linear(6, 6), norm=nn.LayerNorm(6)), X)
    assert not found.sites("head")
    assert [(r.code, "layer_norm" in r.reason) for r in found.refusals("head")] == [("GCC161", True)]


def test_a_submodule_has_no_head() -> None:
    found = find(nn.Sequential(nn.Linear(6, 9)), X, fqn="model.out")
    assert not found.sites("head")
    assert not found.refusals("head")
