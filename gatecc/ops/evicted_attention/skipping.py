"""``gatecc::evicted_attention`` for many queries at once: piece by piece, over the keys that are still there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.ops.evicted_attention.presence import Presence, Rule

_PIECE = 256  # queries at a time: keys that left before the first of them are not read
_WORTH = 0.9  # of the keys: where more are left, all are read where they lie


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    there: Presence,
    *,
    scale: float,
    causal: bool,
    window: int,
    rule: Rule,
    softcap: float,
) -> Tensor:
    """q: (B, H, T, D), the last of the tokens; k, v, there: (B, K, N, ...) of all of them -> (B, H, T, E)."""
    (H, T), (K, N) = q.shape[1:3], k.shape[1:3]
    if T == N and not window and not softcap and bool(there.kept.all()) and (not rule.budget or rule.budget >= N):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=H != K)
    query = q.unflatten(1, (K, H // K))  # (B, K, H / K, T, D)
    made: list[Tensor] = []
    for start in range(N - T, N, _PIECE):
        stop = min(start + _PIECE, N)
        piece = query[:, :, :, start - (N - T) : stop - (N - T)]
        keys, values, seen = _kept(k, v, there, start, stop, causal=causal, window=window, rule=rule)
        made.append(_attention(piece, keys, values, seen, scale, softcap))
    return torch.cat(made, 3).flatten(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float) -> Tensor:
    """q: (B, K, G, T, D), k, v: (B, K, M, ...), seen: (B, K, T, M) -> (B, K, G, T, E)."""
    G, T = q.shape[2:4]
    rows = seen.unsqueeze(2).expand(-1, -1, G, -1, -1).flatten(2, 3)
    flat = q.flatten(2, 3)
    if not softcap:
        return F.scaled_dot_product_attention(flat, k, v, rows, scale=scale).unflatten(2, (G, T))
    scores = softcap * torch.tanh((flat * scale) @ k.mT / softcap)
    return (scores.masked_fill(~rows, -torch.inf).softmax(-1) @ v).unflatten(2, (G, T))


def _kept(
    k: Tensor, v: Tensor, there: Presence, start: int, stop: int, *, causal: bool, window: int, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values that any of the queries start .. stop sees, and which of them each sees: (B, K, T, M)."""
    own = there.cut(start, stop)
    at = torch.arange(start, stop, device=k.device)
    everywhere = torch.arange(k.size(2), device=k.device)
    around = everywhere < start if causal else (everywhere < start) | (everywhere >= stop)
    if window:
        around = around & ((everywhere - start).abs() < window + stop - start)
    first = there.seen_by(there.cut(start, start + 1), rule).squeeze(-2) & around  # nothing comes back later
    most = int(first.sum(-1).max()) if first.numel() else 0
    if causal and most > _WORTH * start and not window:
        index = everywhere[:start].expand(*first.shape[:2], -1)
    else:
        index = first.byte().argsort(dim=-1, descending=True, stable=True)[..., :most]
    other = there.gathered(index)
    seen = other.seen_by(own, rule) & first.gather(-1, index).unsqueeze(-2)
    seen = seen.expand(-1, -1, stop - start, -1)
    if window:
        seen = seen & ((at.unsqueeze(1) - index.unsqueeze(-2)).abs() < window)
    apart = at.unsqueeze(1) - at
    near = apart > 0 if causal else apart != 0
    if window:
        near = near & (apart.abs() < window)
    mine = (own.seen_by(own, rule) & near) | (apart == 0)
    keys, values = (
        torch.cat([x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.size(3))), x[:, :, start:stop]], 2)
        for x in (k, v)
    )
    return keys, values, torch.cat([seen, mine.expand(*seen.shape[:3], -1)], 3)
