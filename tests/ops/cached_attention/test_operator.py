"""Attention over kept keys is attention of the whole text, cut anywhere; prompts may be padded on the right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from gatecc.ops.cached_attention import cached_attention
from gatecc.ops.cached_attention.registration import spelled

B, H, K, N, D = 2, 4, 2, 9, 8


def _text() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, N, D), torch.randn(B, K, N, D), torch.randn(B, K, N, D)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("form", [cached_attention, spelled])
def test_pieces_are_the_whole(form: Callable[..., Any], window: int) -> None:
    q, k, v = _text()
    at = torch.arange(N)
    seen = (at <= at[:, None]) & (at > at[:, None] - (window or N))
    expected = scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True)
    past_k, past_v, parts = k[:, :, :0], v[:, :, :0], list[Tensor]()
    for piece in ((0, 4), (4, 5), (5, 9)):
        rows = slice(*piece)
        out, past_k, past_v = form(
            q[:, :, rows], k[:, :, rows], v[:, :, rows], past_k, past_v, scale=0.3, window=window
        )
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(past_k, k)


def test_a_soft_cap_is_that_of_gemma() -> None:
    q, k, v = _text()
    scores = 5 * torch.tanh((q * 2) @ k.repeat_interleave(2, 1).mT / 5)
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    for form in (cached_attention, spelled):
        out, *_ = form(q, k, v, k[:, :, :0], v[:, :, :0], scale=2.0, softcap=5.0)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [cached_attention, spelled])
def test_what_follows_a_padded_prompt_takes_the_place_of_the_padding(form: Callable[..., Any]) -> None:
    q, k, v = (x[:1] for x in _text())
    expected, *_ = cached_attention(q, k, v, k[:, :, :0], v[:, :, :0], scale=1.0)
    p_q, p_k, p_v = (pad(x[:, :, :5], (0, 0, 0, 2)) for x in (q, k, v))  # 5 tokens in 7 places
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    out, kept_k, kept_v = form(p_q, p_k, p_v, k[:, :, :0], v[:, :, :0], mask, scale=1.0)
    torch.testing.assert_close(out[:, :, :5], expected[:, :, :5], rtol=0, atol=1e-5)
    for at in (5, 6):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        n_q, n_k, n_v = (x[:, :, at : at + 1] for x in (q, k, v))
        out, kept_k, kept_v = form(n_q, n_k, n_v, kept_k, kept_v, mask, scale=1.0)
        torch.testing.assert_close(out, expected[:, :, at : at + 1], rtol=0, atol=1e-5)
