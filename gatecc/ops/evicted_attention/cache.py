"""The cache: keys and values of the tokens that are still there, each head's behind one another.

    keys, values   (C, D) and (C, E): of all samples and heads in one memory
    places         (B, K, 2, 3) int64: where the kept tokens of a head lie (0) and those flagged for eviction (1), which
                   a rule leaves there for a while: the first, how many, and where their room ends

A rule that holds the newest R tokens has R / 3 more rows of ``places``: what each of these is (`newest`).

Heads keep different numbers of tokens, so each has as much room as it needs, and a little more. The oldest of a class
leave by moving its first on. Where a head has no more room, all are laid out anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from gatecc.ops.evicted_attention.presence import FLAGGED, KEPT, NONE, Presence, Rule, classes, near
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
    rule: Rule,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend with new tokens to what is held and to them, and hold what is there behind them, in memory of its own."""
    last = newest(places, rule)
    index, (held_kept, held_flagged), ages = _read(places, last, rule)
    before = [x[index] for x in (keys, values)]  # (B, K, M, ...)
    kept, flagged = classes(keep, valid)
    counts = near(kept, flagged, last, rule)
    rank = kept.cumsum(-1) + flagged.cumsum(-1) - 1
    there = Presence.counted(
        torch.cat([held_kept, kept], -1),
        torch.cat([held_flagged, flagged], -1),
        torch.cat([ages, rank], -1),
        (pad(counts[0], (ages.size(-1), 0)), pad(counts[1], (ages.size(-1), 0))),
    )
    k, v = (torch.cat([old, new.to(old.dtype)], 2) for old, new in zip(before, (k, v), strict=True))
    out = attend(q, k, v, there, scale=scale, causal=True, window=0, rule=rule, softcap=softcap)
    left = there.left(rule)
    keys, values, places = _laid((k, v), left & there.kept, left & there.flagged, rule)
    if rule.recent:
        places = _with_newest(places, torch.cat([last, kept.long() * KEPT + flagged.long() * FLAGGED], -1), rule)
    return out, keys, values, places


def newest(places: Tensor, rule: Rule) -> Tensor:
    """What the newest tokens are, the oldest first: kept, flagged, or none. (B, K, recent)"""
    return places[:, :, 2:].flatten(2)[..., : rule.recent]


def rows(rule: Rule) -> int:
    """How many rows ``places`` has."""
    return 2 + -(-rule.recent // 3)


def _with_newest(places: Tensor, tokens: Tensor, rule: Rule) -> Tensor:
    """``places`` of two rows and the rows that say what the last ones of ``tokens`` (B, K, N) are."""
    last = (tokens != NONE).byte().argsort(dim=-1, stable=True)[..., -rule.recent :]
    found = pad(tokens.gather(-1, last), (0, -rule.recent % 3))
    return torch.cat([places, found.unflatten(-1, (-1, 3))], 2)


def _read(places: Tensor, last: Tensor, rule: Rule) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Where everything that is held lies, (B, K, M), flagged tokens first; what is kept and flagged; and their ranks:
    -1 is the newest, and what is not among the newest lies before them."""
    kept, flagged = places[:, :, 0], places[:, :, 1]
    count = kept[..., COUNT] + flagged[..., COUNT]
    number = torch.arange(int(count.max()) if count.numel() else 0, device=places.device)
    number = number.expand(*count.shape, -1)
    split = flagged[..., COUNT, None]
    is_flagged, here = number < split, number < count.unsqueeze(-1)
    index = torch.where(is_flagged, flagged[..., FIRST, None] + number, kept[..., FIRST, None] + number - split)
    index = torch.where(here, index, 0)
    ages = index.new_full((*count.shape, index.size(-1) + 1), -rule.recent - 1)
    for which, behind in ((FLAGGED, flagged[..., COUNT]), (KEPT, count)):
        mine = last == which
        at = behind.unsqueeze(-1) - mine.sum(-1, keepdim=True) + mine.cumsum(-1) - 1
        ages.scatter_(-1, torch.where(mine, at, index.size(-1)), _ranks(last))
    return index, (here & ~is_flagged, is_flagged), ages[..., :-1]


def _ranks(last: Tensor) -> Tensor:
    return torch.arange(-last.size(-1), 0, device=last.device).expand_as(last)


def _laid(pair: Sequence[Tensor], kept: Tensor, flagged: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """A cache of the tokens (B, K, N) of two classes."""
    which = torch.stack((kept, flagged), 2)  # (B, K, 2, N)
    places = _room(which.sum(-1), rule)
    number = which.cumsum(-1) - 1 + places[..., FIRST, None]
    size = int(places[..., END].max()) if places.numel() else 0
    held: list[Tensor] = []
    for x in pair:
        new = x.new_zeros((size, x.size(3)))
        for i in range(2 if rule.holds_flagged else 1):
            new[number[:, :, i][which[:, :, i]]] = x[which[:, :, i]]
        held.append(new)
    return held[0], held[1], places


def _room(counts: Tensor, rule: Rule) -> Tensor:
    """Places for so many tokens of each class, (B, K, 2), behind one another, with room for more."""
    rooms = counts + counts // _PART + _MORE
    if not rule.holds_flagged:
        rooms = rooms * rooms.new_tensor([1, 0])
    ends = rooms.flatten().cumsum(0).view(counts.shape)
    return torch.stack((ends - rooms, counts, ends), -1)


def enlarged(keys: Tensor, values: Tensor, places: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """The same cache in new memory, where every head has room for more."""
    return _moved(keys, values, places, _room(places[:, :, :2, COUNT], rule))


def reordered(keys: Tensor, values: Tensor, places: Tensor, index: Tensor, rule: Rule) -> tuple[Tensor, ...]:
    """The cache in which sample i holds what sample ``index[i]`` held."""
    chosen = places.index_select(0, index.to(places.device))
    return _moved(keys, values, chosen, _room(chosen[:, :, :2, COUNT], rule))


def _moved(keys: Tensor, values: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = int(new[..., END].max()) if new.numel() else 0
    made = [x.new_zeros((size, x.size(1))) for x in (keys, values)]
    for (start, count, _), (to, *_) in zip(
        old[:, :, :2].flatten(0, 2).tolist(), new.flatten(0, 2).tolist(), strict=True
    ):
        for x, held in zip(made, (keys, values), strict=True):
            x[to : to + count] = held[start : start + count]
    return made[0], made[1], torch.cat([new, old[:, :, 2:]], 2)
