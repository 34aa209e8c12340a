"""The cache: keys and values of the tokens that are still there, each head's behind one another.

    keys, values   (C, D) and (C, E): of all samples and heads in one memory
    places         (B, K, 2, 3) int64: where the kept tokens of a head lie (0) and those flagged for eviction (1), which
                   a budget leaves there for a while: the first, how many, and where their room ends

Heads keep different numbers of tokens, so each has as much room as it needs, and a little more. The oldest of a class
leave by moving its first on. Where a head has no more room, all are laid out anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gatecc.ops.evicted_attention.presence import Presence
from gatecc.ops.evicted_attention.skipping import attend

FIRST, COUNT, END = range(3)
_MORE, _PART = 16, 16  # entries of room to grow, and one for so many that are held


def advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    valid: Tensor | None,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    *,
    scale: float,
    budget: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend with new tokens to what is held and to them, and hold what is there behind them, in memory of its own."""
    index, past = _read(places)
    before = [x[index] for x in (keys, values)]  # (B, K, M, ...)
    there = Presence.of(keep, valid)
    kept = torch.cat([past.kept, there.kept], -1)
    flagged = torch.cat([past.flagged, there.flagged], -1)
    there = Presence(kept, flagged, kept.cumsum(-1), flagged.cumsum(-1))
    k, v = (torch.cat([old, new.to(old.dtype)], 2) for old, new in zip(before, (k, v), strict=True))
    out = attend(q, k, v, there, scale=scale, causal=True, window=0, budget=budget, softcap=softcap)
    left = there.left(budget)
    return out, *_laid((k, v), left & there.kept, left & there.flagged, budget)


def _read(places: Tensor) -> tuple[Tensor, Presence]:
    """Where everything that is held lies, (B, K, M), flagged tokens first, and what it is."""
    kept, flagged = places[:, :, 0], places[:, :, 1]
    count = kept[..., COUNT] + flagged[..., COUNT]
    number = torch.arange(int(count.max()), device=places.device)
    number = number.expand(*count.shape, -1)
    split = flagged[..., COUNT, None]
    is_flagged, here = number < split, number < count.unsqueeze(-1)
    index = torch.where(is_flagged, flagged[..., FIRST, None] + number, kept[..., FIRST, None] + number - split)
    index = torch.where(here, index, 0)
    return index, Presence(here & ~is_flagged, is_flagged, here, here)


def _laid(pair: Sequence[Tensor], kept: Tensor, flagged: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """A cache of the tokens (B, K, N) of two classes."""
    which = torch.stack((kept, flagged), 2)  # (B, K, 2, N)
    places = _room(which.sum(-1), budget)
    number = which.cumsum(-1) - 1 + places[..., FIRST, None]
    size = int(places[..., END].max()) if places.numel() else 0
    held: list[Tensor] = []
    for x in pair:
        new = x.new_zeros((size, x.size(3)))
        for i in range(2 if budget else 1):
            new[number[:, :, i][which[:, :, i]]] = x[which[:, :, i]]
        held.append(new)
    return held[0], held[1], places


def _room(counts: Tensor, budget: int) -> Tensor:
    """Places for so many tokens of each class, (B, K, 2), behind one another, with room for more."""
    rooms = counts + counts // _PART + _MORE
    if not budget:
        rooms = rooms * rooms.new_tensor([1, 0])
    ends = rooms.flatten().cumsum(0).view(counts.shape)
    return torch.stack((ends - rooms, counts, ends), -1)


def enlarged(keys: Tensor, values: Tensor, places: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same cache in new memory, where every head has room for more."""
    return _moved(keys, values, places, _room(places[..., COUNT], budget))


def reordered(keys: Tensor, values: Tensor, places: Tensor, index: Tensor, budget: int) -> tuple[Tensor, ...]:
    """The cache in which sample i holds what sample ``index[i]`` held."""
    chosen = places.index_select(0, index.to(places.device))
    return _moved(keys, values, chosen, _room(chosen[..., COUNT], budget))


def _moved(keys: Tensor, values: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = int(new[..., END].max()) if new.numel() else 0
    made = [x.new_zeros((size, x.size(1))) for x in (keys, values)]
    for (start, count, _), (to, *_) in zip(old.flatten(0, 2).tolist(), new.flatten(0, 2).tolist(), strict=True):
        for x, held in zip(made, (keys, values), strict=True):
            x[to : to + count] = held[start : start + count]
    return made[0], made[1], new
