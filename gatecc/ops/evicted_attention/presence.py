"""Presence: which keys are still there when a query comes, from the flags, the budget and what stays for being new."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

NONE, FLAGGED, KEPT = range(3)  # what one of the newest tokens is, see ``Presence.of``


class Rule(NamedTuple):
    """What stays beside the flags: the ``recent`` newest tokens whatever they say, a ``budget`` of tokens in all.

    What is no longer among the newest comes under the flags, and under what the newest leave of the budget.
    """

    budget: int = 0
    recent: int = 0

    @property
    def room(self) -> int:
        """For tokens that are not among the newest."""
        return self.budget - self.recent

    @property
    def holds_flagged(self) -> bool:
        """Whether a token that is flagged may stay for a while."""
        return bool(self.budget or self.recent)


class Presence(NamedTuple):
    """Two classes of tokens, kept and flagged for eviction, and how many of each there are up to each token.

    All (B, K, N). Of either class the oldest leave first, so that its members that are still there are its newest.
    ``rank`` counts tokens, padding left out; ``kept_before`` and ``flagged_before`` how many there are before a token
    and are not among the newest.
    """

    kept: Tensor
    flagged: Tensor
    kept_so_far: Tensor
    flagged_so_far: Tensor
    kept_before: Tensor
    flagged_before: Tensor
    rank: Tensor

    @classmethod
    def of(cls, keep: Tensor, valid: Tensor | None, rule: Rule) -> Self:
        """keep: (B, K, N), above a half where a token is kept. valid: (B, N), False at padding, which is never kept."""
        kept, flagged = classes(keep, valid)
        rank = kept.cumsum(-1) + flagged.cumsum(-1) - 1
        return cls.counted(kept, flagged, rank, near(kept, flagged, None, rule))

    @classmethod
    def counted(cls, kept: Tensor, flagged: Tensor, rank: Tensor, newest: tuple[Tensor, Tensor]) -> Self:
        """Of two classes, in the order of their ages. ``newest``: how many of each are among the newest before each."""
        counts = kept.cumsum(-1), flagged.cumsum(-1)
        before = counts[0] - kept.long() - newest[0], counts[1] - flagged.long() - newest[1]
        return cls(kept, flagged, *counts, *before, rank)

    def gathered(self, index: Tensor) -> Presence:
        """The tokens of ``index`` (B, K, M), which count as before."""
        return Presence(*(x.gather(-1, index) for x in self))

    def cut(self, start: int, stop: int) -> Presence:
        """The tokens start .. stop, which count as before."""
        return Presence(*(x[..., start:stop] for x in self))

    def seen_by(self, queries: Presence, rule: Rule) -> Tensor:
        """Which of these are there when a query comes that is later than all of them, (B, K, queries or 1, keys)."""
        kept, flagged = self.kept.unsqueeze(-2), self.flagged.unsqueeze(-2)
        if rule.budget:
            if_kept, if_flagged = self.room(queries, rule)
            seen = (kept & if_kept) | (flagged & if_flagged)
        else:
            seen = kept
        return seen | ((kept | flagged) & self.is_new(queries, rule)) if rule.recent else seen

    def is_new(self, queries: Presence, rule: Rule) -> Tensor:
        """Whether each is among the newest tokens before a query."""
        return queries.rank.unsqueeze(-1) - self.rank.unsqueeze(-2) <= rule.recent

    def room(self, queries: Presence, rule: Rule) -> tuple[Tensor, Tensor]:
        """Whether each would still be there as a kept token, and as a flagged one; see ``seen_by``."""
        kept, flagged = queries.kept_before.unsqueeze(-1), queries.flagged_before.unsqueeze(-1)
        if_kept = kept - self.kept_so_far.unsqueeze(-2) < rule.room
        if_flagged = flagged - self.flagged_so_far.unsqueeze(-2) < rule.room - kept.clamp(max=rule.room)
        return if_kept, if_flagged

    def left(self, rule: Rule) -> Tensor:
        """Which are there behind the last token, (B, K, N)."""
        new = (self.kept | self.flagged) & (self.rank > self.rank.amax(-1, keepdim=True) - rule.recent)
        if not rule.budget:
            return self.kept | new
        kept, flagged = ((x & ~new).sum(-1, keepdim=True) for x in (self.kept, self.flagged))
        room = rule.room - kept.clamp(max=rule.room)
        stays = self.kept & (kept - self.kept_so_far < rule.room)
        return stays | (self.flagged & (flagged - self.flagged_so_far < room)) | new


def classes(keep: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens are kept, and which are flagged; padding is neither. (B, K, N)"""
    kept = keep > 0.5
    if valid is None:
        return kept, ~kept
    here = valid.unsqueeze(1)
    return kept & here, ~kept & here


def near(kept: Tensor, flagged: Tensor, newest: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """How many tokens of each class are among the newest before each token, (B, K, N); 0 where nothing asks for it.

    ``newest``: what the tokens before these are, (B, K, ``recent``), the oldest first.
    """
    if not (rule.budget and rule.recent):
        nothing = torch.zeros_like(kept, dtype=torch.int64)
        return nothing, nothing
    width = rule.recent
    past = kept.new_zeros((*kept.shape[:2], width), dtype=torch.int64) if newest is None else newest
    token = (kept | flagged).long()
    before = token.cumsum(-1) - token
    at = torch.where(token > 0, before + width + 1, kept.size(-1) + width + 1)  # padding: behind all
    made: list[Tensor] = []
    for held, mine in ((past == KEPT, kept), (past == FLAGGED, flagged)):
        so_far = held.long().cumsum(-1)
        table = torch.nn.functional.pad(so_far, (1, kept.size(-1) + 1))
        table = table.scatter(-1, at, so_far[..., -1:] + mine.long().cumsum(-1))
        made.append(table.gather(-1, before + width) - table.gather(-1, before))
    return made[0], made[1]


def visibility(there: Presence, causal: bool, window: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """Which keys each query sees, and of which its flag decides that, both (B, K, N, N). A token always sees itself."""
    N = there.kept.size(-1)
    at = torch.arange(N, device=there.kept.device)
    apart = at.unsqueeze(1) - at  # how far a key lies before its query
    others = apart > 0 if causal else apart != 0
    if window:
        others = others & (apart < window) & (apart > -window)
    seen = there.seen_by(there, rule) & others
    token = (there.kept | there.flagged).unsqueeze(-2)
    differs = others & token
    if rule.budget:
        if_kept, if_flagged = there.room(there, rule)
        differs = differs & (if_kept != if_flagged)
    if rule.recent:
        differs = differs & ~there.is_new(there, rule)
    return seen | (apart == 0), differs.expand_as(seen)
