"""Attention to chosen blocks in ATen: every key is computed, and those of other blocks are masked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ops.block_gate.reference import count, filled, pooled, turned
from gatecc.ops.evicted_attention.masked import at_padding

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_raw: Tensor,
    k_raw: Tensor,
    query: Tensor,
    key: Tensor,
    cut: Tensor,
    keep: Tensor | None = None,
    *cache: Tensor | None,
    block: int,
    scale: float,
    base: float = 0.0,
    ranked: bool = True,
    spread: bool = False,
) -> Result:
    """The operator's result, without a cache. Gradients reach q, k and v."""
    if any(x is not None for x in cache):
        raise ArgumentError(
            "no gradient goes through a cache", found="keys of earlier tokens", do="use torch.no_grad()"
        )
    asked, known, of_query, of_key = q_raw.detach(), k_raw.detach(), query.detach(), key.detach()
    chosen = of_all(asked, known, of_query, of_key, cut, keep, block=block, base=base, ranked=ranked)
    start = torch.zeros((), dtype=torch.int64, device=q.device)
    out = over(q, k, v, seen(chosen, start, keep, q.size(2), block), scale)
    return at_padding(out, v, keep, spread), *no_cache(q, k, v, query)


def of_all(
    q_raw: Tensor,
    k_raw: Tensor,
    query: Tensor,
    key: Tensor,
    cut: Tensor,
    keep: Tensor | None,
    *,
    block: int,
    base: float,
    ranked: bool,
) -> Tensor:
    """Which blocks each token of a text sees, (B, K, N, n) of bool."""
    features = of_blocks(k_raw, key, keep, block, base)
    own = torch.arange(q_raw.size(2), device=q_raw.device) // block
    there = torch.ones_like(features[:, 0, :, 0], dtype=torch.bool) if keep is None else filled(keep, block)
    return choice(logits(q_raw, query, features, own, block, base), cut, there, own, ranked)


def over(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention under a mask (B, K, T, M)."""
    groups = q.size(1) // k.size(1)
    k, v, mask = (x if groups == 1 else x.repeat_interleave(groups, 1) for x in (k, v, mask))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def seen(chosen: Tensor, start: Tensor | int, keep: Tensor | None, length: int, block: int) -> Tensor:
    """Which keys new tokens see: those of chosen blocks up to themselves, and themselves. (B, K, T, n) -> (B, K, T, M)

    ``start``: tokens before; keep: (B, M) of bool.
    """
    wide = chosen.unsqueeze(-1).expand(*chosen.shape, block).flatten(3)[..., :length]
    places = torch.arange(length, device=chosen.device)
    at = torch.arange(chosen.size(2), device=chosen.device).unsqueeze(1) + start
    wide = wide & (places <= at)
    wide = wide if keep is None else wide & keep[:, None, None]
    return wide | (places == at)


def of_blocks(k_raw: Tensor, key: Tensor, keep: Tensor | None, block: int, base: float) -> Tensor:
    """Features of the blocks of keys: (B, K, N, D) and (K, 3 D, R) -> (B, K, n, R)"""
    pools = pooled(k_raw.float(), keep, block)
    return turned(pools @ key.float(), torch.arange(pools.size(2), device=key.device) * block, base)


def logits(q_raw: Tensor, query: Tensor, features: Tensor, own: Tensor, block: int, base: float) -> Tensor:
    """Scores of blocks for each token, whose own block is ``own``: (B, H, T, D), (K, D, R), (B, K, n, R), (T,) ->
    (B, K, T, n) in float32. The heads that share a key head are averaged."""
    mean = q_raw.unflatten(1, (query.size(0), -1)).float().mean(2)
    asked = turned(mean @ query.float(), own * block, base)
    return asked @ features.mT * features.size(-1) ** -0.5


def choice(logits: Tensor, cut: Tensor, there: Tensor, own: Tensor, ranked: bool) -> Tensor:
    """Which blocks each token sees: (B, K, T, n) of bool. there: (B, n), the blocks that hold a token; own: (T,).

    Its own block and the first are always among them; its own, which is not whole yet, is not scored. Of m blocks up to
    its own it keeps ceil(cut m), or those before its own whose softmax exceeds ``cut``.
    """
    at = torch.arange(logits.size(-1), device=logits.device)
    before = (at < own[:, None]) & there[:, None]  # (B, T, n)
    first = before & (at == there.int().argmax(-1)[:, None])[:, None]
    mine = (at == own[:, None])[None, None]
    before, first = before.unsqueeze(1), first.unsqueeze(1)
    scores = logits.masked_fill(~before, -math.inf)
    if not ranked:
        return mine | first | (before & (torch.softmax(scores, -1) > cut))  # NaN where there is no block
    wanted = torch.ceil((before.sum(-1, keepdim=True) + 1) * cut - 1e-4) - 1
    order = torch.sort(scores.masked_fill(first, math.inf), dim=-1, descending=True, stable=True).indices
    rank = torch.sort(order, dim=-1).indices
    return mine | first | (before & (rank < wanted))


def loss(
    q_raw: Tensor,
    k_raw: Tensor,
    q: Tensor,
    k: Tensor,
    query: Tensor,
    key: Tensor,
    keep: Tensor | None,
    block: int,
    scale: float,
    base: float,
) -> Tensor:
    """KL(p || softmax(s)) over the blocks before a token's own, its mean over tokens that have some: (). p is the
    largest attention weight in each block and in the heads of a group, divided by the sum of its row."""
    N = q.size(2)
    n, own = count(N, block), torch.arange(N, device=q.device) // block
    s = logits(q_raw, query, of_blocks(k_raw, key, keep, block, base), own, block, base)
    there = torch.ones_like(s[:, 0, 0], dtype=torch.bool) if keep is None else filled(keep, block)
    before = ((torch.arange(n, device=q.device) < own[:, None]) & there[:, None]).unsqueeze(1)
    groups = q.size(1) // k.size(1)
    with torch.no_grad():
        peaks = torch.zeros_like(s)
        for i in range(n):  # memory grows with N * block
            rows = slice(i * block, min(N, (i + 1) * block))
            part = seen(torch.ones_like(s[:, :, rows, : i + 1], dtype=torch.bool), rows.start, None, rows.stop, block)
            part = part if keep is None else part & keep[:, None, None, : rows.stop]
            scores = q[:, :, rows].float() * scale @ k[:, :, : rows.stop].float().repeat_interleave(groups, 1).mT
            weights = scores.masked_fill(~part.repeat_interleave(groups, 1), -math.inf).softmax(-1).nan_to_num(0.0)
            whole = weights[..., : i * block].unflatten(3, (i, block)).amax(4)
            peaks[:, :, rows, :i] = whole.unflatten(1, (-1, groups)).amax(2)
        peaks = peaks * before
        peaks = peaks / peaks.sum(-1, keepdim=True).clamp_min(1e-30)
    log_p = torch.log_softmax(s.masked_fill(~before, -1e9), -1)
    terms = torch.where(peaks > 0, peaks * (peaks.clamp_min(1e-30).log() - log_p), 0.0).sum(-1)
    rows_ = before.any(-1).expand_as(terms)
    rows_ = (rows_ if keep is None else rows_ & keep[:, None]).to(terms.dtype)
    return (terms * rows_).sum() / rows_.sum().clamp_min(1)


def no_cache(q: Tensor, k: Tensor, v: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A cache of no tokens: keys, values, features of whole blocks, the pools of the one that is not whole, what is no
    padding, the number of tokens."""
    B, K, D, R = k.size(0), k.size(1), k.size(3), query.size(2)
    wide: Any = {"dtype": torch.float32, "device": k.device}
    return (
        k.new_zeros((B, K, 0, D)),
        v.new_zeros((B, K, 0, v.size(3))),
        torch.zeros((B, K, 0, R), **wide),
        torch.zeros((B, K, 1, 3 * query.size(1) + 1), **wide),
        torch.zeros((B, 0), dtype=torch.bool, device=k.device),
        torch.zeros((1,), dtype=torch.int64),
    )
