"""Activations."""

from __future__ import annotations

import pytest
import torch

from gatecc.errors import ArgumentError
from gatecc.ir.gates.activation import Activation

Z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("sigmoid(scale=2, bias=0.5, slope=3)", 2 * torch.sigmoid(3 * Z + 0.5)),
        ("tanh(scale=2)", 2 * torch.tanh(Z)),
        ("1+tanh", 1 + torch.tanh(Z)),
        ("decay(c=8)", torch.sigmoid(-Z) ** 8),
        ("logsigmoid(16)", torch.sigmoid(Z) ** (1 / 16)),
        ("logsigmoid(16, log=True)", torch.nn.functional.logsigmoid(Z) / 16),
        ("softmax(T=2)", torch.softmax(Z / 2, -1)),
        ("softmax", torch.softmax(Z, -1)),
        ("softmax(scale=size)", 6 * torch.softmax(Z, -1)),
        ("softmax(pre_activation=tanh)", torch.softmax(torch.tanh(Z), -1)),
        ("linear", Z),
        ("relu", Z.clamp_min(0)),
        ("swish", Z * torch.sigmoid(Z)),
        ("threshold(0.7)", (torch.sigmoid(Z) > 0.7).float()),
    ],
)
def test_formulas(text: str, want: torch.Tensor) -> None:
    torch.testing.assert_close(Activation.parse(text)(Z), want)


def test_topk_keeps_k_and_zeroes_the_rest_exactly() -> None:
    kept = Activation.parse("topk(2)")(Z)
    assert ((kept > 0).sum(-1) == 2).all()
    torch.testing.assert_close(kept.sum(-1), torch.ones(4))
    raw = Activation.parse("topk(2, renorm=False)")(Z)
    torch.testing.assert_close(raw, torch.softmax(Z, -1) * (kept > 0))
    with pytest.raises(ArgumentError, match="k=9 of 6"):
        Activation.parse("topk(9)")(Z)


def test_sinkhorn_balances_columns_in_training_only() -> None:
    z = torch.randn(64, 8)
    sinkhorn = Activation.parse("sinkhorn(iters=50)")
    plan = sinkhorn(z, training=True)
    torch.testing.assert_close(plan.sum(-1), torch.ones(64))
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 8.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(sinkhorn(z), torch.softmax(z, -1))
    assert (sinkhorn(z).sum(0) - 8).abs().max() > 0.1


def test_selective_sinkhorn_is_used_in_a_fraction_of_steps() -> None:
    z = torch.randn(16, 4)
    plain = torch.softmax(z, -1)
    sinkhorn = Activation.parse("sinkhorn(iters=8, p=0.25)")
    used = sum(not torch.allclose(sinkhorn(z, training=True), plain) for _ in range(200))
    assert 25 < used < 80
