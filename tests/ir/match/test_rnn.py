"""RNN sites: what they read and yield, and what a rewrite must know of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.ir.match.found import Lambda, find


@pytest.mark.parametrize(("cell", "name", "layers"), [(nn.GRU, "gru", 1), (nn.LSTM, "lstm", 2), (nn.RNN, "rnn", 1)])
def test_values_and_facts(cell: Any, name: str, layers: int) -> None:
    first = name != "rnn"
    torch.manual_seed(0)
    rnn = cell(3, 4, num_layers=layers, batch_first=first, bidirectional=name == "rnn")
    model = Lambda(lambda m, x: m.rnn(m.inp(x))[0] * 2, inp=nn.Linear(3, 3), rnn=rnn)
    x = torch.randn(2, 5, 3)
    found = find(model, x)
    (site,) = found.sites("rnn")
    assert (site.owner, site.cell, site.layers) == ("rnn", name, layers)
    assert site.bidirectional == (name == "rnn")
    assert set(found.axes(site).values()) == {"bnc" if first else "nbc"}
    inner: Any = model.inp(x)  # pyright: ignore[reportCallIssue]
    assert torch.equal(found.value(site, "in"), inner)
    assert torch.allclose(found.value(site, "out"), rnn(inner)[0], atol=1e-6)
    assert {f"rnn.{n}" for n, _ in rnn.named_parameters()} == set(site.parameters)
    assert len(site.states) == 1 + (name == "lstm")
    assert site.last == (None, None)


def test_a_layer_whose_last_state_alone_is_read_has_no_out() -> None:
    found = find(Lambda(lambda m, x: m.rnn(x)[1], rnn=nn.GRU(3, 4)), torch.randn(2, 5, 3))
    (site,) = found.sites("rnn")
    assert set(site.values) == {"in"}
    assert site.last[0] is not None
