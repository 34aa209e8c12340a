"""Balance: losses by the papers' formulas and by transformers, biases, capacity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.balance import Balance, Capacity, LossFreeBias, Routed, counts, figures
from gatecc.ir.gates.choice import Choice, Chosen
from gatecc.ir.router import RouterSpec

TEXTS = [
    "none",
    "aux",
    "aux(weight=0.02, normalise_by_k=False)",
    "z(weight=0.1)",
    "cv2(of=importance)",
    "bias(rate=0.1)",
    "capacity(factor=2.0)",
    "aux+z",
    "aux+z+bias+capacity",
]


def routed(z: Tensor, choice: str, real: Tensor | None = None) -> Routed:
    experts = z.size(1) // 2 if choice.startswith("noisy") else z.size(1)
    decision = Choice.parse(choice).decide(z, {}, True, real)
    weight = torch.ones(z.size(0), 1) if real is None else real.float().unsqueeze(-1)
    return Routed(z[:, :experts], decision, counts(decision.chosen.indices, experts), weight)


def value(balance: str, *args: Any) -> Tensor:
    return Balance.parse(balance).loss(routed(*args))


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_json(text: str) -> None:
    balance = Balance.parse(text)
    assert balance == Balance.parse(str(balance)) == Balance.from_json(balance.to_json())


@given(tokens=st.integers(1, 20), k=st.integers(1, 4), padded=st.booleans())
def test_auxiliary_loss_as_transformers_counts_it(tokens: int, k: int, padded: bool) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    torch.manual_seed(tokens)
    z = torch.randn(tokens, 6)
    real = torch.rand(tokens) < 0.6 if padded else None
    if real is not None:
        real[0] = True
    theirs = load_balancing_loss_func((z,), 6, k, None if real is None else real.long().view(1, -1))
    ours = value("aux(weight=1.0, normalise_by_k=False)", z, f"softmax_topk({k})", real)
    torch.testing.assert_close(ours, torch.as_tensor(theirs))
    torch.testing.assert_close(value("aux(weight=1.0)", z, f"softmax_topk({k})", real), ours / k)


def test_auxiliary_loss_is_its_weight_when_uniform() -> None:
    z = torch.eye(4) * 1e-4
    torch.testing.assert_close(value("aux(weight=0.5)", z, "softmax_topk(1)"), torch.tensor(0.5))


def test_its_gradient_flows_through_probabilities_alone() -> None:
    z = torch.randn(30, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(value("aux(weight=1.0)", z, "softmax_topk(2)"), z)
    again = z.detach().requires_grad_()
    share = torch.zeros(30, 5).scatter(1, again.topk(2).indices, 1.0).mean(0) / 2
    (expected,) = torch.autograd.grad(5 * (share * torch.softmax(again, -1).mean(0)).sum(), again)
    torch.testing.assert_close(grad, expected)


def test_z_loss() -> None:
    z = torch.randn(9, 4)
    expected = 0.3 * (z.exp().sum(-1).log() ** 2).mean()
    torch.testing.assert_close(value("z(weight=0.3)", z, "softmax_topk(1)"), expected)
    real = torch.arange(9) < 4
    expected = 0.3 * (z[:4].exp().sum(-1).log() ** 2).mean()
    torch.testing.assert_close(value("z(weight=0.3)", z, "softmax_topk(1)", real), expected)


def test_variation_of_importance_and_load() -> None:
    z = torch.randn(40, 10)
    torch.manual_seed(1)
    both = value("cv2(weight=1.0)", z, "noisy_topk(2)")
    torch.manual_seed(1)
    decision = Choice.parse("noisy_topk(2)").decide(z, {}, True)
    weights, indices = decision.chosen
    sums = torch.zeros(40, 5).scatter(1, indices, weights).sum(0)
    assert decision.load is not None
    load = decision.load.sum(0)
    expected = sums.var() / sums.mean() ** 2 + load.var() / load.mean() ** 2
    torch.testing.assert_close(both, expected)


def test_losses_of_no_token_are_zero() -> None:
    for text in ("aux", "z", "cv2(of=importance)"):
        assert value(text, torch.zeros(0, 4), "softmax_topk(2)") == 0


def test_the_bias_moves_towards_the_mean_load() -> None:
    bias = LossFreeBias(0.1).moved(torch.zeros(4), torch.tensor([8.0, 2.0, 4.0, 2.0]))
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.1, 0.0, 0.1]))


def test_the_bias_selects_and_does_not_weigh() -> None:
    z = torch.tensor([[3.0, 2.0, 1.0]])
    bias = torch.tensor([-9.0, 0.0, 0.0])
    for text, plain in (("softmax_topk(2)", torch.softmax(z[:, 1:], -1)), ("sigmoid_topk(2)", None)):
        weights, indices = Choice.parse(text)(z, {"expert_bias": bias}, False)
        s = torch.sigmoid(z[:, 1:])
        assert indices.tolist() == [[1, 2]]
        torch.testing.assert_close(weights, s / s.sum() if plain is None else plain)


@given(tokens=st.integers(0, 30), factor=st.sampled_from([0.5, 1.0, 1.25, 8.0]), seed=st.integers(0, 3))
def test_capacity_by_a_loop(tokens: int, factor: float, seed: int) -> None:
    torch.manual_seed(seed)
    indices = torch.rand(tokens, 4).argsort(-1)[:, :2]
    real = torch.rand(tokens, 1) < 0.8
    limited = Capacity(factor).limited(Chosen(torch.rand(tokens, 2), indices), 4, real)
    slots = 2 * int(real.sum())
    used = [0] * 4
    expected = torch.full_like(indices, 4)
    for j in range(2):
        for t in range(tokens):
            e = int(indices[t, j])
            if real[t] and used[e] * 4 < factor * slots:
                used[e] += 1
                expected[t, j] = e
    assert torch.equal(limited.indices, expected)
    assert (max(used) if tokens else 0) <= -(-factor * slots // 4)


def test_figures() -> None:
    z = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [5.0, 5.0, 5.0]])
    seen = routed(z, "softmax_topk(1)", torch.tensor([True, True, False]))
    found = figures(seen, torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0]]))
    p = torch.softmax(z[:2], -1)
    assert found[:2].tolist() == [1, 2]
    assert found[3:].tolist() == [0, 1, 1, 0, 1, 1, 0]
    torch.testing.assert_close(found[2], -(p * p.log()).sum())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"choice": "expert_choice", "balance": "capacity"}, "experts that choose"),
        ({"choice": "dense", "balance": "bias"}, "which select with a bias"),
        ({"choice": "softmax_topk(2)", "balance": "cv2"}, "noisy_topk"),
        ({"source": "cond(ids)", "scorer": "hash", "balance": "aux"}, "gradients train"),
        ({"scorer": "lstsq", "balance": "aux+bias"}, "gradients train"),
    ],
)
def test_refuses_what_cannot_balance(options: dict[str, str], expected: str) -> None:
    with pytest.raises(ArgumentError, match=expected):
        RouterSpec(**({"init": "zero"} | options))


def test_joins_each_once() -> None:
    with pytest.raises(ArgumentError, match="each once"):
        Balance.parse("aux+aux")
