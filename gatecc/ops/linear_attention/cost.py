"""What ``gatecc::linear_attention`` costs: floating-point operations for torch's counter, and bytes.

Counted as pipeline/cost.py does: matrix products, two operations per multiply-add; products with gates are pointwise,
and count as nothing. Per token and head, of the recurrence and not of a chunked form: what a kernel does beyond it is
its own affair. Linear in the number of tokens, where attention's count is quadratic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Shape = Sequence[int]


def flops(q: Shape, v: Shape, *, delta: bool = False, normalize: bool = False, backward: bool = False) -> int:
    """FLOPs of one call on q: (B, H, N, Dk) and v: (B, Hv, N, Dv).

    Forward, the state is written and read once a token: k u^T and S^T q; the delta rules read it once more, S^T k.
    Backward, there are two products for each of these, and the states are computed again.
    """
    B, H, N, Dk = q
    products = 3 if delta else 2
    if backward:
        products += 2 * products - 1  # all but the outputs again
    return 2 * products * B * H * N * Dk * (v[3] + int(normalize))


def moved_bytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of one call, given its inputs and outputs: each is read or written once, the states stay in the caches."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def forward(q: Shape, k: Shape, v: Shape, *rest: Any, normalize: bool = False, **_: Any) -> int:
    """Of the operator's arguments."""
    return flops(q, v, delta=_has_beta(rest), normalize=normalize)


def backward(
    grad_o: Shape, grad_state: Shape, q: Shape, k: Shape, v: Shape, *rest: Any, normalize: bool = False, **_: Any
) -> int:
    """Of the arguments of its gradient."""
    return flops(q, v, delta=_has_beta(rest), normalize=normalize, backward=True)


def step(q: Shape, k: Shape, v: Shape, *rest: Any, **_: Any) -> int:
    """Of the arguments of one step."""
    B, H, Dk = q
    return flops((B, H, 1, Dk), (B, H, 1, v[2]), delta=_has_beta(rest))


def _has_beta(rest: tuple[Any, ...]) -> bool:
    """``rest`` is log_decay, beta and what follows."""
    return len(rest) > 1 and rest[1] is not None
