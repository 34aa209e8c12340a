"""What ``gatecc::attention`` costs: floating-point operations for torch's counter, and bytes.

Products alone, two operations per multiply-add, of the pairs that causality and the window leave. Each tensor is read
or written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

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


def forward(q: Shape, k: Shape, v: Shape, *_: Any, **options: Any) -> int:
    """Of the operator's arguments: q k^T and p v."""
    B, H, N, D = q
    return 2 * B * H * pairs(N, k[2], **options) * (D + v[3])


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
