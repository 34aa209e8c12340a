"""``gatecc::cached_attention``: schema, reference, fake kernel.

A step of the derived decoder that is written to a file calls it: keys and values come and leave as tensors, so that a
runtime may hold them in one buffer and do the whole of it in one node. It has no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gatecc.ops.transforms import LIBRARY

LIBRARY.define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, Tensor? mask=None, *, float scale, "
    "int window=0, float softcap=0.0) -> (Tensor out, Tensor present_k, Tensor present_v)"
)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(q k^T) v of new tokens. q: (B, H, T, D); k, v: (B, K, T, D), of which H / K heads share one; past_k,
    past_v: (B, K, P, D) -> the result like q, and keys and values (B, K, P + T, D).

    ``window``: how many keys a query sees, itself among them; 0 for all. ``mask``: (B, P + T), of which the sum says
    how many tokens a row has: prompts are padded on the right, and what comes after them takes the places of the
    padding. Without a mask all count.
    """
    return torch.ops.gatecc.cached_attention(q, k, v, past_k, past_v, mask, scale=scale, window=window, softcap=softcap)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """In ATen."""
    new, total = q.size(2), past_k.size(2) + q.size(2)
    first = torch.full((q.size(0),), total - new) if mask is None else (mask.sum(1) - new).clamp(min=0)
    at = first[:, None] + torch.arange(new)  # (B, T), the places of the new tokens
    keys, values = (_placed(torch.cat([past, x], 2), x, at) for past, x in ((past_k, k), (past_v, v)))
    seen = torch.arange(total) <= at[:, None, :, None]
    if window:
        seen = seen & (torch.arange(total) > at[:, None, :, None] - window)
    group = q.size(1) // k.size(1)
    scores = (q * scale) @ keys.repeat_interleave(group, 1).mT
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = torch.where(seen, scores, -torch.inf).softmax(-1)
    return weights @ values.repeat_interleave(group, 1), keys, values


def _placed(whole: Tensor, new: Tensor, at: Tensor) -> Tensor:
    return whole.scatter(2, at[:, None, :, None].expand_as(new), new)


def _fake(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, *rest: Tensor | None, **options: float):
    keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    return q.new_empty((*q.shape[:3], v.size(3))), keys, values


LIBRARY.impl("cached_attention", reference, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::cached_attention", _fake, lib=LIBRARY)
