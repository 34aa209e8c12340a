"""Experts: MLPs with stacked weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ir.match.found import Lambda, find

E, D, H = 3, 6, 8


class Experts(nn.Module):
    """All experts on all tokens, weighted. x: (T, D), p: (T, E) -> (T, D)"""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.gate_up_proj = nn.Parameter(torch.randn(E, D, 2 * H) if transposed else torch.randn(E, 2 * H, D))
        self.down_proj = nn.Parameter(torch.randn(E, H, D) if transposed else torch.randn(E, D, H))

    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        if not self.transposed:
            up, down = up.mT, down.mT
        gate, value = torch.bmm(x.expand(E, -1, -1), up).chunk(2, -1)
        return torch.einsum("etd,te->td", torch.bmm(F.silu(gate) * value, down), p)


def moe(m: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    return x + m.experts(flat, m.router(flat).softmax(-1)).view_as(x)


def test_stacked_experts_of_both_orientations() -> None:
    for transposed, orientation in ((False, "out_in"), (True, "in_out")):
        found = find(Lambda(moe, experts=Experts(transposed=transposed), router=nn.Linear(D, E)), torch.randn(2, 5, D))
        (site,) = found.sites("mlp")
        assert (site.owner, site.form, site.activation) == ("experts", "experts", "silu")
        assert {role: (w.fqn, w.orientation) for role, w in site.weights.items()} == {
            "gate_up": ("experts.gate_up_proj", orientation),
            "down": ("experts.down_proj", orientation),
        }
        assert found.value(site, "in").shape == found.value(site, "out").shape == (10, D)
        assert found.codes("linear") == ["GCC131"] * 2


def test_stacked_weights_without_an_activation_are_no_experts() -> None:
    """One matrix per head."""
    heads = Lambda(
        lambda m, x: torch.bmm(torch.bmm(x, m.a), m.b),
        a=nn.Parameter(torch.randn(2, D, H)),
        b=nn.Parameter(torch.randn(2, H, D)),
    )
    found = find(Lambda(lambda m, x: m.heads(x), heads=heads), torch.randn(2, 5, D))
    assert not found.sites("mlp")
    assert not found.refusals("mlp")


def test_experts_that_yield_two_values_are_refused() -> None:
    def both(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.bmm(F.relu(torch.bmm(x, m.a)), m.b)
        return h, h * 2

    experts = Lambda(both, a=nn.Parameter(torch.randn(2, D, H)), b=nn.Parameter(torch.randn(2, H, D)))
    found = find(Lambda(lambda m, x: sum(m.experts(x)), experts=experts), torch.randn(2, 5, D))
    assert found.codes("mlp") == ["GCC144"]
