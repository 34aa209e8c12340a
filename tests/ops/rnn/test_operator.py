"""gatecc::rnn against torch.nn.GRU and torch.nn.LSTM."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ops.rnn import rnn

NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


def cell(kind: str) -> tuple[nn.RNNBase, list[Tensor]]:
    module = (nn.GRU if kind == "gru" else nn.LSTM)(4, 6, batch_first=True, dtype=torch.float64)
    return module, [module.get_parameter(name) for name in NAMES]


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_equals_the_module(kind: str) -> None:
    module, weights = cell(kind)
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    y, last = rnn(x, *weights, kind)
    expected, states = module(x)
    torch.testing.assert_close((y, last), (expected, torch.cat(states) if kind == "lstm" else states))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_it_goes_on_from_its_state(kind: str) -> None:
    _, weights = cell(kind)
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    first, state = rnn(x[:, :3], *weights, kind)
    then, last = rnn(x[:, 3:], *weights, kind, state)
    torch.testing.assert_close((torch.cat([first, then], 1), last), rnn(x, *weights, kind))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_gradients_and_registration(kind: str) -> None:
    _, weights = cell(kind)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    state = torch.randn(1 + (kind == "lstm"), 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *leaves: rnn(*leaves[:5], kind, leaves[5]), (x, *weights, state))
    torch.library.opcheck(torch.ops.gatecc.rnn.default, (x, *weights, kind))
    torch.library.opcheck(torch.ops.gatecc.rnn.default, (x, *weights, kind, state))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_every_other_derivative(kind: str) -> None:
    module, weights = cell(kind)
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    given = (x, *weights)
    assert torch.autograd.gradcheck(
        lambda *leaves: rnn(*leaves, kind), given, check_forward_ad=True, check_batched_grad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(lambda *leaves: rnn(*leaves, kind), given, fast_mode=True)
    several = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    found = torch.func.vmap(lambda x: rnn(x, *weights, kind)[0])(several)
    torch.testing.assert_close(found, torch.stack([module(one)[0] for one in several]))


def test_a_later_token_changes_nothing_before_it() -> None:
    _, weights = cell("gru")
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    y = x.clone()
    y[:, 4:] += 1
    (a, _), (b, _) = rnn(x, *weights, "gru"), rnn(y, *weights, "gru")
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.equal(a[:, 4:], b[:, 4:])


def test_an_unknown_cell() -> None:
    _, weights = cell("gru")
    with pytest.raises(ArgumentError, match="gru, lstm"):
        rnn(torch.randn(1, 2, 4, dtype=torch.float64), *weights, "rnn")
