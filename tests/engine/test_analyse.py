"""The ladder: what could not be captured is refused with the reason, never left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gatecc


class Deciding(nn.Module):
    """Attention that looks at its data in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if float(q.sum()) > 1e9:
            return v
        return (q @ k.mT).softmax(-1) @ v


def test_code_that_stays_in_python_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Deciding(), nn.Linear(8, 8))
    report = gatecc.inspect(model, (torch.randn(2, 5, 8),))
    assert not [s for s in report.sites if s.kind == "attention"]
    refused = {r.owner: r for r in report.refusals if r.kind == "module"}
    assert refused.keys() == {"", "1"}
    assert all(r.code == "GCC004" and r.remedy and len(r.reason) > 50 for r in refused.values())
    assert {s.owner for s in report.sites if s.kind == "linear"} >= {"0", "2"}


class Aliased(nn.Module):
    """A deciding module, and a module of the body that the whole holds by a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), Deciding())
        self.first = self.body[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_module_with_two_names_is_looked_at_once() -> None:
    report = gatecc.inspect(Aliased(), (torch.randn(2, 5, 8),))
    owners = [s.owner for s in report.sites if s.kind == "linear"]
    assert owners.count("body.0") == 1
    assert "first" not in owners


def test_what_a_token_meets_of_experts_is_counted() -> None:
    """2 of 4 experts: half of their weights, and all else."""
    pytest.importorskip("transformers")
    from tests.ir.match.test_routing import E, K, X, block

    mixture = block("mixtral", "eager")
    found = gatecc.inspect(mixture, (X,))
    (site,) = [row for row in found.sites if row.kind == "mlp"]
    assert site.detail == f"experts silu, {K} of {E}"
    experts = sum(p.numel() for p in mixture.experts.parameters())
    assert found.totals.active_before == sum(p.numel() for p in mixture.parameters()) - experts * (E - K) // E
    assert gatecc.inspect(nn.Linear(2, 2), (torch.randn(2, 2),)).totals.active_before is None
