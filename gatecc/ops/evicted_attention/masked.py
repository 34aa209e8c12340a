"""``gatecc::evicted_attention`` as a formula: every key is computed, and evicted ones are masked.

It is what flags learn from, what torch.func differentiates, and the form in ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ops.evicted_attention.cache import rows
from gatecc.ops.evicted_attention.presence import Presence, Rule, visibility


def masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    valid: Tensor | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    places: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    budget: int = 0,
    recent: int = 0,
    softcap: float = 0.0,
    spread: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's result, without a cache.

    The gradient of a flag is straight-through: what the output would change by if the key came or went, to first order
    for keys that are there, w/(1+w) (v - o) for those that are not, where w is the weight that a key would have.
    """
    if keys is not None:
        raise ArgumentError(
            "no gradient goes through a cache", found="keys of earlier tokens", do="call it under torch.no_grad()"
        )
    rule = Rule(budget, recent)
    seen, differs = visibility(Presence.of(keep, valid, rule), causal, window, rule)
    H, K = q.size(1), k.size(1)
    wide = torch.promote_types(q.dtype, torch.float32)
    query = (q * scale).unflatten(1, (K, H // K)).to(wide)
    scores = query @ k.to(wide).unsqueeze(2).mT  # (B, K, H / K, N, N)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    value = v.to(wide).unsqueeze(2)
    hidden = scores.masked_fill(~seen.unsqueeze(2), -torch.inf)
    weights = hidden.softmax(-1)
    out = weights @ value
    if torch.is_grad_enabled() and keep.requires_grad:
        out = out + _straight_through(scores, hidden, weights, seen, differs, value, out, keep)
    return at_padding(out.flatten(1, 2).to(q.dtype), v, valid, spread), *no_cache(q, k, v, recent)


def _straight_through(
    scores: Tensor,
    hidden: Tensor,
    weights: Tensor,
    seen: Tensor,
    differs: Tensor,
    value: Tensor,
    out: Tensor,
    keep: Tensor,
) -> Tensor:
    """Zero, with the gradient of the flags."""
    with torch.no_grad():
        would = torch.sigmoid(scores - hidden.logsumexp(-1, keepdim=True))
        would = torch.where(seen.unsqueeze(2), weights, would) * differs.unsqueeze(2)
    flagged = would * keep.to(would.dtype)[:, :, None, None]
    change = flagged @ value.detach() - flagged.sum(-1, keepdim=True) * out.detach()
    return change - change.detach()


def at_padding(out: Tensor, v: Tensor, valid: Tensor | None, spread: bool) -> Tensor:
    """The result, with what padding gets: 0, or the mean of all values. out: (B, H, N, E)"""
    if valid is None:
        return out
    here = valid[:, None, :, None]
    if not spread:
        return torch.where(here, out, out.new_zeros(()))
    mean = v.mean(2, keepdim=True).repeat_interleave(out.size(1) // v.size(1), 1)
    return torch.where(here, out, mean.to(out.dtype))


def no_cache(q: Tensor, k: Tensor, v: Tensor, recent: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A cache that holds nothing: keys (0, D), values (0, E), places (B, K, 2, 3), or more rows."""
    places = torch.zeros((q.size(0), k.size(1), rows(Rule(0, recent)), 3), dtype=torch.int64, device=q.device)
    return k.new_zeros((0, k.size(3))), v.new_zeros((0, v.size(3))), places
