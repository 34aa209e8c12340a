"""Presence: which keys are still there when a query comes, from the flags and the budget."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Presence(NamedTuple):
    """Two classes of tokens, kept and flagged for eviction, and how many of each there are up to each token.

    All (B, K, N). Of either class the oldest leave first, so that its members that are still there are its newest.
    """

    kept: Tensor
    flagged: Tensor
    kept_so_far: Tensor
    flagged_so_far: Tensor

    @classmethod
    def of(cls, keep: Tensor, valid: Tensor | None) -> Self:
        """keep: (B, K, N), above a half where a token is kept. valid: (B, N), False at padding, which is never kept."""
        kept = keep > 0.5
        flagged = ~kept
        if valid is not None:
            here = valid.unsqueeze(1)
            kept, flagged = kept & here, flagged & here
        return cls(kept, flagged, kept.cumsum(-1), flagged.cumsum(-1))

    def gathered(self, index: Tensor) -> Presence:
        """The tokens of ``index`` (B, K, M), which count as before."""
        return Presence(*(x.gather(-1, index) for x in self))

    def cut(self, start: int, stop: int) -> Presence:
        """The tokens start .. stop, which count as before."""
        return Presence(*(x[..., start:stop] for x in self))

    def _before(self) -> tuple[Tensor, Tensor]:
        """How many tokens of each class come before each token, (B, K, N, 1)."""
        counts = self.kept_so_far - self.kept.long(), self.flagged_so_far - self.flagged.long()
        return counts[0].unsqueeze(-1), counts[1].unsqueeze(-1)

    def seen_by(self, queries: Presence, budget: int) -> Tensor:
        """Which of these are there when a query comes that is later than all of them, (B, K, queries or 1, keys)."""
        kept, flagged = self.kept.unsqueeze(-2), self.flagged.unsqueeze(-2)
        if not budget:
            return kept
        if_kept, if_flagged = self.room(queries, budget)
        return (kept & if_kept) | (flagged & if_flagged)

    def room(self, queries: Presence, budget: int) -> tuple[Tensor, Tensor]:
        """Whether each would still be there as a kept token, and as a flagged one; see ``seen_by``."""
        kept, flagged = queries._before()
        if_kept = kept - self.kept_so_far.unsqueeze(-2) < budget
        if_flagged = flagged - self.flagged_so_far.unsqueeze(-2) < budget - kept.clamp(max=budget)
        return if_kept, if_flagged

    def left(self, budget: int) -> Tensor:
        """Which are there behind the last token, (B, K, N)."""
        if not budget:
            return self.kept
        kept, flagged = self.kept_so_far[..., -1:], self.flagged_so_far[..., -1:]
        room = budget - kept.clamp(max=budget)
        return (self.kept & (kept - self.kept_so_far < budget)) | (
            self.flagged & (flagged - self.flagged_so_far < room)
        )


def visibility(there: Presence, causal: bool, window: int, budget: int) -> tuple[Tensor, Tensor]:
    """Which keys each query sees, and of which its flag decides that, both (B, K, N, N). A token always sees itself."""
    N = there.kept.size(-1)
    at = torch.arange(N, device=there.kept.device)
    apart = at.unsqueeze(1) - at  # how far a key lies before its query
    others = apart > 0 if causal else apart != 0
    if window:
        others = others & (apart < window) & (apart > -window)
    seen = there.seen_by(there, budget) & others
    token = (there.kept | there.flagged).unsqueeze(-2)
    differs = others & token
    if budget:
        if_kept, if_flagged = there.room(there, budget)
        differs = differs & (if_kept != if_flagged)
    return seen | (apart == 0), differs.expand_as(seen)
