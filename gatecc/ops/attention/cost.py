"""What ``gatecc::attention`` costs: floating-point operations for torch's counter, and bytes.

Products alone, two operations per multiply-add, of the pairs that causality, the window and a map of blocks leave.
Each tensor is read or written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gatecc.ops.paths import Taken

Shape = Sequence[int]


def pairs(N: int, S: int, *, causal: bool = False, window: int | None = None, **_: Any) -> int:
    """Pairs of a query and a key that it sees; the last query stands at the last key."""
    before = S if window is None else window
    if not causal and window is None:
        return N * S
    if window is None:
        return _sum_to(S) - _sum_to(S - N)
    one_side = _sum_to(S, before) - _sum_to(S - N, before)
    # Of the other side: the query i places before the end sees no more than i keys behind it.
    return one_side if causal else one_side + _sum_to(N - 1, before - 1)


def _sum_to(n: int, at_most: int | None = None) -> int:
    """The sum over i = 1 .. n of min(i, at_most)."""
    if n <= 0:
        return 0
    if at_most is None or n <= at_most:
        return n * (n + 1) // 2
    return at_most * (at_most + 1) // 2 + (n - at_most) * at_most


def forward(q: Shape, k: Shape, v: Shape, *_: Any, slots: int | None = None, **options: Any) -> int:
    """Of the operator's arguments: q k^T and p v. ``slots``: the pairs of all heads that are computed, if not all."""
    B, H, N, D = q
    count = B * H * pairs(N, k[2], **options) if slots is None else slots
    return 2 * count * (D + v[3])


def served(
    q: Tensor, k: Tensor, *_: Any, blocks: Tensor | None = None, **options: Any
) -> tuple[tuple[Tensor, ...], int, int] | None:
    """The pairs of all heads that a map of blocks leaves, and how many there are; None without a map."""
    if blocks is None:
        return None
    B, H, N = q.shape[:3]
    every = B * H * pairs(N, k.size(2), **options)
    if not _is_known(blocks):
        return (), every, every
    kept = blocks * _pairs_of_blocks(N, k.size(2), **options)
    return (), int(kept.sum()) * (B // blocks.size(0)) * (H // blocks.size(1)), every


def taken(q: Tensor, k: Tensor, *_: Any, out: Any, blocks: Tensor | None = None, **options: Any) -> Taken | None:
    """How many pairs of blocks each head computes, of those in which a query sees a key."""
    if blocks is None or not _is_known(blocks):
        return None
    some = _pairs_of_blocks(q.size(2), k.size(2), **options) > 0
    counts = (blocks & some).sum((0, 2, 3)).expand(q.size(1)) * (q.size(0) // blocks.size(0))
    return Taken("block of keys", counts.tolist(), q.size(0) * int(some.sum()))


def _pairs_of_blocks(
    N: int,
    S: int,
    *,
    causal: bool = False,
    window: int | None = None,
    block_sizes: Sequence[int] = (64, 64),
    **_: Any,
) -> Tensor:
    """How many pairs of a query and a key that it sees there are in each block of both."""
    queries, keys = block_sizes
    rows, columns = (N + queries - 1) // queries, (S + keys - 1) // keys
    at = torch.arange(S - N, S)[:, None]
    first = torch.arange(columns) * keys
    last = (first + keys).clamp(max=S)
    low = first if window is None else torch.maximum(first, at - window + 1)
    high = torch.minimum(last, at + 1) if causal else last
    high = high if window is None or causal else torch.minimum(high, at + window)
    seen = (high - low).clamp_min(0).expand(N, -1)
    return torch.nn.functional.pad(seen, (0, 0, 0, rows * queries - N)).unflatten(0, (rows, queries)).sum(1)


def _is_known(blocks: Tensor) -> bool:
    return blocks.device.type != "meta" and not isinstance(blocks, FakeTensor)


def backward(
    grad: Shape, grad_logsumexp: Shape, out: Shape, logsumexp: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **o: Any
) -> int:
    """Of its gradient: the scores again, dv, dp, dk and dq."""
    B, H, N, D = q
    return 2 * B * H * pairs(N, k[2], **o) * (3 * D + 2 * v[3])


def moved_bytes(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None, **_: Any) -> int:
    """Bytes of one call."""
    B, H, N, _D = q.shape
    given = sum(x.numel() * x.element_size() for x in (q, k, v, *rest) if x is not None)
    return given + B * H * N * (v.size(3) * q.element_size() + 4)
