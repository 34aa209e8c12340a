"""Weights that are normalised later, or by something else than their sum, are kept as those of any attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import DecoderError
from tests.decoder.mixing import D, Mixed, V
from tests.decoder.stepping import difference, full, stepped

WINDOW = 5


class Weighed(nn.Module):
    """exp(scores) v over 1 + their sum; the window is masked before the exponential, behind it, or not at all."""

    def __init__(self, masked: str) -> None:
        super().__init__()
        self.masked, self.qkv = masked, nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT / 4
        at = torch.arange(x.shape[1])
        distance = at[:, None] - at
        seen = (distance >= 0) & (distance < WINDOW) if "window" in self.masked else distance >= 0
        if "behind" in self.masked:
            weights = scores.exp() * seen
        elif self.masked == "not":
            weights = scores.exp()
        else:
            scores = scores.masked_fill(~seen, float("-inf"))
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return weights @ v / (1 + weights.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("masked", "span"), [("before, window", "window 5"), ("behind, window", "window 5"), ("before", "all")]
)
def test_steps_are_the_full_forward(masked: str, span: str) -> None:
    model = Mixed(Weighed(masked)).eval()
    made = gatecc.decoder(model, (torch.randint(V, (2, 16)),))
    assert [(slot.kind, str(slot.span)) for slot in made.plan.slots] == [("keys", span)] * 2
    ids = torch.randint(V, (3, 16))
    assert difference(full(model, ids), stepped(made, ids)) <= 1e-5


def test_a_sum_over_all_tokens_is_refused() -> None:
    with pytest.raises(DecoderError, match="does not prove causal: bidirectional"):
        gatecc.decoder(Mixed(Weighed("not")).eval(), (torch.randint(V, (2, 16)),))
