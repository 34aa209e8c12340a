"""Gates of blocks in ATen: the definition, and what runs on every device. Only the numbers of blocks are squared."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gatecc.ops.attention.arguments import Arguments, arguments
from gatecc.ops.attention.reference import masked, raw_scores

POOLS = 3  # mean, maximum, minimum


def count(tokens: int, block: int) -> int:
    """How many blocks cover so many tokens; the last may have fewer."""
    return (tokens + block - 1) // block  # ONNX divides towards zero


def pooled(x: Tensor, keep: Tensor | None, block: int) -> Tensor:
    """Mean, maximum and minimum over the tokens of each block. x: (B, H, N, D), keep: (B, N) -> (B, H, n, 3 D).

    Tokens that are not kept belong to no block; one without tokens yields zeros.
    """
    n = count(x.size(2), block)
    missing = n * block - x.size(2)
    x = torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(2, (n, block))
    if keep is None:
        there = torch.arange(n * block, device=x.device).view(1, 1, n, block, 1) < n * block - missing
    else:
        there = torch.nn.functional.pad(keep, (0, missing)).view(-1, 1, n, block, 1)
    found = there.sum(3)
    mean = (x * there).sum(3) / found.clamp_min(1).to(x.dtype)
    largest = x.masked_fill(~there, -math.inf).amax(3)
    smallest = x.masked_fill(~there, math.inf).amin(3)
    extremes = (torch.where(found > 0, e, torch.zeros_like(e)) for e in (largest, smallest))
    return torch.cat((mean, *extremes), -1)


def rotated(x: Tensor, block: int, base: float) -> Tensor:
    """The rotary embedding at the first place of each block. x: (B, H, n, R), R even."""
    return turned(x, torch.arange(x.size(2), device=x.device) * block, base)


def turned(x: Tensor, places: Tensor, base: float) -> Tensor:
    """The rotary embedding at places (n,), none if the base is 0. x: (B, H, n, R), R even."""
    if not base:
        return x
    half = x.size(3) // 2
    rates = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = places.to(torch.float32)[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def logits(
    q: Tensor, k: Tensor, query: Tensor, key: Tensor, keep: Tensor | None, block: int, base: float = 0.0
) -> Tensor:
    """See gatecc.ops.block_gate.operator.block_logits."""
    a, b = (
        pooled(x, keep, block).float() @ weight.float() for x, weight in ((q, query), (k, key))
    )  # (B, H, n, 3 D) x (H, 3 D, R)
    if base:
        a, b = rotated(a, block, base), rotated(b, block, base)
    grouped = a.unflatten(1, (k.size(1), q.size(1) // k.size(1)))
    return (grouped @ b.unsqueeze(2).mT).flatten(1, 2) * a.size(3) ** -0.5


def seen(logits: Tensor, keep: Tensor | None, causal: bool, window: int | None, block: int) -> Tensor:
    """Which blocks hold a key that a query of a block may see: booleans that broadcast to (B, H, n, n)."""
    n = logits.size(-1)
    at = torch.arange(n, device=logits.device)
    behind = at[:, None] - at
    shown = behind >= 0 if causal else behind == behind
    if window is not None:
        shown = shown & ((behind - 1) * block < window - 1)
        shown = shown if causal else shown & ((-behind - 1) * block < window - 1)
    shown = shown[None, None]
    return shown if keep is None else shown & _filled(keep, n, block)[:, None, None]


def filled(keep: Tensor, block: int) -> Tensor:
    """The blocks that hold a token, (B, n)."""
    return _filled(keep, count(keep.size(1), block), block)


def _filled(keep: Tensor, n: int, block: int) -> Tensor:
    """The blocks that hold a token, (B, n)."""
    return torch.nn.functional.pad(keep, (0, n * block - keep.size(1))).unflatten(1, (n, block)).any(-1)


def choice(
    logits: Tensor,
    cut: Tensor,
    keep: Tensor | None,
    block: int,
    ranked: bool = True,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """See gatecc.ops.block_gate.operator.block_choice."""
    n = logits.size(-1)
    shown = seen(logits, keep, causal, window, block).expand(*logits.shape[:2], n, n)
    at = torch.arange(n, device=logits.device)
    always = (at[:, None] == at)[None, None]
    if keep is None:
        always = always | (at == 0)
    else:
        always = always | (at == _filled(keep, n, block).int().argmax(-1)[:, None])[:, None, None]
    always = always & shown
    if not ranked:
        probability = torch.softmax(logits.masked_fill(~shown, -math.inf), -1)  # NaN where no block is shown
        return always | (shown & (probability > cut))
    wanted = torch.ceil(shown.sum(-1, keepdim=True) * cut - 1e-4)
    first = logits.masked_fill(~shown, -math.inf).masked_fill(always, math.inf)
    order = torch.sort(first, dim=-1, descending=True, stable=True).indices
    rank = torch.sort(order, dim=-1).indices
    chosen = always | (shown & (rank < wanted))
    if keep is None:
        return chosen
    whole = torch.nn.functional.pad(keep, (0, n * block - keep.size(1)), value=True).unflatten(1, (n, block)).all(-1)
    return chosen | ((cut >= 1) & ~whole[:, None, :, None])


def peaks(a: Arguments, block: int) -> Tensor:
    """See gatecc.ops.block_gate.operator.block_peaks. A block of queries at a time: memory grows with N * block."""
    N, S = a.q.size(2), a.k.size(2)
    n, m = count(N, block), count(S, block)
    found = a.q.new_zeros((*a.q.shape[:2], n, m), dtype=torch.float32)
    for i in range(n):
        rows = slice(i * block, min(N, (i + 1) * block))
        keys = slice(0, rows.stop if a.causal else S)  # so that the last query stands at the last key
        part = a._replace(q=a.q[:, :, rows], k=a.k[:, :, keys], v=a.v[:, :, keys], bias=_part(a.bias, rows, keys))
        if a.window is not None and not a.causal:
            raise NotImplementedError
        weights = _weights(part)
        short = count(weights.size(3), block)
        weights = torch.nn.functional.pad(weights, (0, short * block - weights.size(3)))
        found[:, :, i, :short] = weights.unflatten(3, (short, block)).amax((2, 4)).float()
    return found / found.sum(-1, keepdim=True).clamp_min(1e-30)


def _part(bias: Tensor | None, rows: slice, keys: slice) -> Tensor | None:
    if bias is None:
        return None
    bias = bias if bias.size(2) == 1 else bias[:, :, rows]
    return bias if bias.size(3) == 1 else bias[:, :, :, keys]


def _weights(a: Arguments) -> Tensor:
    """The softmax (B, H, N, S); zeros for a query that sees nothing."""
    scores = masked(a, raw_scores(a))
    if a.sinks is not None:
        sinks = a.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return weights[..., : a.k.size(2)]


def divergence(
    logits: Tensor, peaks: Tensor, keep: Tensor | None, causal: bool, window: int | None, block: int
) -> Tensor:
    """KL(peaks || softmax(logits)) over the blocks that may be seen, its mean over rows that hold a token: ()."""
    shown = seen(logits, keep, causal, window, block)
    log_p = torch.log_softmax(logits.masked_fill(~shown, -1e9), -1)
    terms = torch.where(peaks > 0, peaks * (torch.log(peaks.clamp_min(1e-30)) - log_p), 0.0).sum(-1)  # (B, H, n)
    if keep is None:
        return terms.mean()
    rows = _filled(keep, logits.size(-1), block)[:, None].expand_as(terms).to(terms.dtype)
    return (terms * rows).sum() / rows.sum().clamp_min(1)


__all__ = ["POOLS", "arguments", "choice", "count", "divergence", "logits", "peaks", "pooled", "rotated", "seen"]
