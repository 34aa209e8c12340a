"""The chunk form against the recurrence: every rule, odd lengths, and decays that overflow simpler forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gatecc.ops.linear_attention import linear_attention
from gatecc.ops.linear_attention.kernels import KERNELS
from tests.ops.linear_attention.cases import RULES, double, leaves, operands, relative


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator as it is where there is no kernel."""
    monkeypatch.delitem(KERNELS, "cpu", raising=False)


def gradients(given: dict[str, Any]) -> tuple[Tensor, ...]:
    found = leaves(given)
    o, state = linear_attention(**found)
    return o, state, *torch.autograd.grad(o.square().sum() + state.sum(), list(found.values()))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("N", [1, 7, 64, 65, 200])
def test_equals_the_recurrence(rule: str, N: int) -> None:
    given = {**operands(rule, N=N, Dk=8, Dv=12, k=1), "initial_state": torch.randn(1, 2, 8, 12)}
    for found, truth in zip(gradients(given), gradients(double(given)), strict=True):
        assert relative(found, truth) < 3e-6


@pytest.mark.parametrize("kind", ["-3", "-12", "mixed", "zero", "one"])
@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
def test_strong_and_absent_decay(rule: str, kind: str) -> None:
    given = operands(rule, N=300, kind=kind)
    assert relative(linear_attention(**given)[0], linear_attention(**double(given))[0]) < 2e-4
