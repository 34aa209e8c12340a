"""Where results of linear attention lie: as queries do, so that joining the heads of a token copies nothing.

Models that project all heads at once and read them as (B, N, H, D) join them again behind the operator. A result in
another order would be copied there: a tenth of the time of 2048 tokens and 4 heads on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false


def joined(x: Tensor) -> bool:
    """Whether the heads of a token of x: (B, H, N, D) lie together, not the tokens of a head."""
    _, head, token, _ = x.stride()
    return guard_or_false(head < token)


def room(like: Tensor, width: int, dtype: torch.dtype | None = None, heads: int | None = None) -> Tensor:
    """(B, H, N, width) in the order of ``like``: (B, H, N, D), not filled."""
    B, H, N = like.size(0), like.size(1) if heads is None else heads, like.size(2)
    if joined(like):
        return like.new_empty((B, N, H, width), dtype=dtype).transpose(1, 2)
    return like.new_empty((B, H, N, width), dtype=dtype)


def laid(x: Tensor, like: Tensor) -> Tensor:
    """x: (B, H, N, D) as ``room`` would have it, a copy only if it lies otherwise."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if joined(like) else x.contiguous()
