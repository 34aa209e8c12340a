"""ragged: rows of several lengths, of which an attention_mask tells padding and tokens apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MASK = "attention_mask"


@dataclass(frozen=True)
class Padded:
    """Inputs that are padded on one side. ``seen``: the masks, (B, N) True at tokens."""

    leaves: tuple[Tensor, ...]
    side: str
    seen: list[Tensor]

    def tokens(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """What outputs are at tokens, and those with a value per row where the first place of each is a token.

        Queries before the first token of their row see no key: each runtime gives something else there. What else there
        is of them (weights of attention, keys) is put down as one zero.
        """
        found: list[Tensor] = []
        for x in outputs:
            kept = [mask for mask in self.seen if x.shape[:2] == mask.shape]
            if kept:
                found.append(x[torch.stack(kept).all(0)])
            else:
                found.append(x if self.side == "right" and x.dim() <= 2 else torch.zeros(1, dtype=x.dtype))
        return found


def masks_of(names: Sequence[str], leaves: Sequence[Tensor]) -> list[int]:
    """Which inputs are such masks, (B, N) of integers or booleans."""
    return [
        at
        for at, (name, x) in enumerate(zip(names, leaves, strict=True))
        if name.endswith(MASK) and x.dim() == 2 and not x.is_floating_point()
    ]


def ragged(mask: Tensor, side: str) -> Tensor:
    """A mask of the same shape whose rows have fewer and fewer tokens, at least half of them."""
    rows, length = mask.shape
    hidden = torch.tensor([[row * length // (2 * rows)] for row in range(rows)])
    at = torch.arange(length)
    seen = at >= hidden if side == "left" else at < length - hidden
    return seen.to(mask.device, mask.dtype)
