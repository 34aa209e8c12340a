"""Convolutions, running totals and linear attention have step rules; what looks ahead is refused by node."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import DecoderError
from tests.decoder.mixing import (
    Centred,
    Convolution,
    LinearAttention,
    Mixed,
    Reversed,
    RunningMaximum,
    RunningMean,
    V,
    WholeMean,
)
from tests.decoder.stepping import difference, full, stepped

CAUSAL = {
    "convolution, cut": lambda: Convolution(cut=True),
    "convolution, padded": lambda: Convolution(cut=False),
    "convolution, dilated": lambda: Convolution(cut=False, dilation=2),
    "mean": RunningMean,
    "maximum": RunningMaximum,
    "linear": lambda: LinearAttention("linear"),
    "gated": lambda: LinearAttention("gated"),
    "delta": lambda: LinearAttention("delta"),
    "gated delta": lambda: LinearAttention("gated delta"),
    "normalised": lambda: LinearAttention("normalised"),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_steps_are_the_full_forward(name: str) -> None:
    model = Mixed(CAUSAL[name]()).eval()
    ids = torch.randint(V, (2, 16))
    made = gatecc.decoder(model, (ids,))
    assert difference(full(model, ids), stepped(made, ids)) <= 1e-5


def test_the_state_of_linear_attention_does_not_grow() -> None:
    made = gatecc.decoder(Mixed(LinearAttention("gated")).eval(), (torch.randint(V, (2, 16)),))
    _, short = made.prefill(torch.randint(V, (3, 2)))
    _, long = made.prefill(torch.randint(V, (3, 200)))
    assert [s.shape for s in short["slots"]] == [s.shape for s in long["slots"]] == [(3, 2, 8, 8)]


@pytest.mark.parametrize(
    ("mixer", "culprit"),
    [
        (Centred(), "conv1d"),
        (WholeMean(), "mean"),
        (Reversed(), "flip"),
        (LinearAttention("reversed"), "linear_attention"),
    ],
    ids=["convolution", "mean", "flip", "linear attention"],
)
def test_what_looks_ahead_is_refused_by_node(mixer: nn.Module, culprit: str) -> None:
    with pytest.raises(DecoderError, match=culprit) as raised:
        gatecc.decoder(Mixed(mixer).eval(), (torch.randint(V, (2, 16)),))
    assert "mixer" in raised.value.where
    assert ".py:" in raised.value.where
