"""EvoMoE's gate: from all experts at a large temperature to k at a small one."""

from __future__ import annotations

import pytest
import torch

from gatecc.ir.gates.choice import Choice

Z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def active(T: float, k: int = 2) -> float:
    choice = Choice.parse(f"dense_to_sparse(k={k}, T={T})")
    _, indices = choice(Z, choice.buffers(8), True)
    return float((indices < 8).sum(-1).float().mean())


@pytest.mark.parametrize("k", [1, 3])
def test_ends_of_the_temperature(k: int) -> None:
    torch.manual_seed(0)
    assert active(1000.0, k) == 8
    assert active(1e-3, k) == k


def test_fewer_experts_as_it_falls() -> None:
    torch.manual_seed(0)
    counts = [active(T) for T in (3.0, 0.6, 0.3, 0.1)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_takes_the_mean_number_above_the_threshold() -> None:
    choice = Choice.parse("dense_to_sparse(k=1, T=0.4)")
    torch.manual_seed(3)
    decision = choice.decide(Z, choice.buffers(8), True)
    wanted = max(1, round(float((decision.probabilities > 1e-3).sum(-1).float().mean())))
    assert ((decision.chosen.indices < 8).sum(-1) == wanted).all()
    best = decision.probabilities.topk(wanted, -1)
    torch.testing.assert_close(
        decision.chosen.weights[:, :wanted], best.values / best.values.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6
    )


def test_padding_does_not_count() -> None:
    choice = Choice.parse("dense_to_sparse(k=1, T=0.05)")
    z = torch.cat([torch.eye(8)[:4] * 50, torch.zeros(60, 8)])  # one clear expert each; the rest would take all
    keep = torch.arange(64) < 4
    torch.manual_seed(0)
    _, indices = choice.decide(z, choice.buffers(8), True, keep).chosen
    assert ((indices < 8).sum(-1) == 1).all()


def test_eval_is_the_softmax_over_the_k_largest() -> None:
    choice = Choice.parse("dense_to_sparse(k=2, T=0.4)")
    weights, indices = choice(Z, choice.buffers(8), False)
    top = Z.topk(2, -1)
    assert torch.equal(indices, top.indices)
    torch.testing.assert_close(weights, torch.softmax(top.values, -1))
