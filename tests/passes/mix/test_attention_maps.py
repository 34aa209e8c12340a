"""Weights of an attention that was replaced are not shown; what the model computes of them it goes on to compute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.ir.effects import Effects
from gatecc.recipes import resolve
from gatecc.scope.state import scopes


class Attention(nn.Module):
    """Causal attention that returns its weights, dropped out in training, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        hidden = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
        weights = (q @ k.mT * 0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        weights = nn.functional.dropout(weights, 0.2, self.training)
        return self.o((weights @ v).transpose(1, 2).flatten(2)), weights


class Net(nn.Module):
    """``reads``: the model weighs tokens by how much they are seen, besides showing the weights."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.reads = Attention(), reads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, int]:
        y, weights = self.attention(x)
        shown: Tensor | None = weights
        if self.reads:
            y = y * weights.mean(1).sum(-2).unsqueeze(-1)
            shown = None
        return x + y, shown, 7


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scope", ["auto", "model"])
@pytest.mark.parametrize("recipe", ["gla", "gam"])
def test_weights_that_nothing_uses_are_not_shown(scope: Any, recipe: str) -> None:
    student: Any = gatecc.transform(Net(reads=False).eval(), recipe, (X,), scope=scope)
    for training in (False, True):
        y, weights, number = student.train(training)(X)
        assert (y.shape, weights, number) == (X.shape, None, 7)
    sources = [e.variant.source for _, _, s in scopes(student) for kinds in s.family.entries.values() for e in kinds]
    assert recipe == "gam" or not any("softmax" in s for s in sources), "what nothing reads is not computed"
    assert any("no attention weights" in note for note in gatecc.last_report(student).notes)
    assert gatecc.revert(student).eval()(X)[1].shape == (2, 2, 5, 5)


def test_a_gate_leaves_them() -> None:
    model: Any = Net(reads=False).eval()
    gated: Any = gatecc.transform(model, "gated-attention", (X,))
    assert torch.allclose(gated(X)[1], model(X)[1], atol=1e-6)


def test_what_is_computed_of_them_stays() -> None:
    model: Any = Net(reads=True).eval()
    student: Any = gatecc.transform(model, "gla", (X,))
    assert [fqn for fqn, _, _ in scopes(student)] == [""], "the reader is in the scope"
    alone: Any = gatecc.transform(Net(reads=False).eval(), "gla", (X,))
    alone.load_state_dict(student.state_dict())
    seen = model.attention(X)[1].mean(1).sum(-2).unsqueeze(-1)
    assert torch.allclose(student(X)[0], X + (alone(X)[0] - X) * seen, atol=1e-5)


@dataclass(frozen=True)
class Undeclared(gatecc.Mix):
    """Does what mix does, and does not say that it takes outputs away."""

    name = "undeclared"

    def effects(self) -> Effects:
        return replace(super().effects(), loses_outputs=False)


def test_outputs_that_go_are_declared() -> None:
    mix = next(rewrite for rewrite in resolve("gla").rewrites if isinstance(rewrite, gatecc.Mix))
    with pytest.raises(gatecc.GateccError, match="the outputs changed"):
        gatecc.transform(Net(reads=False).eval(), Undeclared(mix.site, mix.mixer), (X,))
