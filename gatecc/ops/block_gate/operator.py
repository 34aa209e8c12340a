"""``gatecc::block_logits``, ``gatecc::block_choice``, ``gatecc::block_peaks``: schemas, fake kernels, gradients.

They are operators so that a captured graph holds for sequences of any length, whatever number of blocks these have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.ops.attention.arguments import arguments
from gatecc.ops.block_gate import reference


@torch.library.custom_op("gatecc::block_logits", mutates_args=())
def block_logits(
    q: Tensor, k: Tensor, query: Tensor, key: Tensor, keep: Tensor | None, block: int, base: float = 0.0
) -> Tensor:
    """Scores of blocks of keys for blocks of queries, (B, H, n, n) in float32 (SeerAttention, 2024).

        s_ij = r(W_q pool(q of block i)) r(W_k pool(k of block j)) / sqrt(R)

    where pool joins mean, maximum and minimum over the tokens of a block, and r turns by the place of its first.

    Args:
        q, k: (B, H, N, D) and (B, G, N, D), before any rotary embedding. G divides H.
        query, key: (H, 3 D, R) and (G, 3 D, R), R even.
        keep: (B, N) of bool, False at padding, which is pooled nowhere.
        block: tokens of a block; the last may have fewer.
        base: of the rotary embedding, 0 for none.

    Differentiable once in ``query`` and ``key`` alone: nothing else learns from a gate.
    """
    return reference.logits(q, k, query, key, keep, block, base)


@block_logits.register_fake
def _(q: Tensor, k: Tensor, query: Tensor, key: Tensor, keep: Tensor | None, block: int, base: float = 0.0) -> Tensor:
    n = reference.count(q.size(2), block)
    return q.new_empty((q.size(0), q.size(1), n, n), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.block, ctx.base = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, query, key, keep = ctx.saved_tensors
    query_grad, key_grad = torch.ops.gatecc.block_logits_backward(grad, q, k, query, key, keep, ctx.block, ctx.base)
    return None, None, query_grad, key_grad, None, None, None


@torch.library.custom_op("gatecc::block_logits_backward", mutates_args=())
def block_logits_backward(
    grad: Tensor, q: Tensor, k: Tensor, query: Tensor, key: Tensor, keep: Tensor | None, block: int, base: float
) -> tuple[Tensor, Tensor]:
    """The gradients of ``query`` and ``key``."""

    def forward(query: Tensor, key: Tensor) -> Tensor:
        return reference.logits(q, k, query, key, keep, block, base)

    found = torch.func.vjp(forward, query, key)[1](grad)
    return found[0].contiguous(), found[1].contiguous()


@block_logits_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, query: Tensor, key: Tensor, keep: Tensor | None, block: int, base: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)


block_logits.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("gatecc::block_choice", mutates_args=())
def block_choice(
    logits: Tensor,
    cut: Tensor,
    keep: Tensor | None,
    block: int,
    ranked: bool = True,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Which blocks of keys each block of queries sees: booleans (B, H, n, n), the map of ``gatecc::attention``.

    Of m blocks that hold a key which it may see, a row keeps the ceil(``cut`` m) of the largest logits if ``ranked``,
    else those whose softmax exceeds ``cut``; always the block itself and the first that holds a token, which count
    among them. With ``cut`` 1 a block of queries that holds padding keeps even what it may not see, for there a query
    may see nothing, and gets of hidden keys what its mask says. Of equal logits the earlier block is kept.

    logits: (B, H, n, n), cut: (), keep: (B, N) of bool.
    """
    return reference.choice(logits, cut, keep, block, ranked, causal, window)


@block_choice.register_fake
def _(logits: Tensor, cut: Tensor, keep: Tensor | None, block: int, *rest: Any, **options: Any) -> Tensor:
    return torch.empty_like(logits, dtype=torch.bool)


@torch.library.custom_op("gatecc::block_peaks", mutates_args=())
def block_peaks(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    block: int,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The largest attention weight in each block, divided by the sum of its row of blocks: (B, H, n, n) in float32.

    What a gate of blocks learns from. The arguments are those of ``gatecc::attention``. It has no gradient, and holds
    the weights of one block of queries at a time.
    """
    a = arguments(q, k, k, None, bias, scale=scale, causal=causal, window=window, softcap=softcap)
    return reference.peaks(a, block)


@block_peaks.register_fake
def _(q: Tensor, k: Tensor, bias: Tensor | None, block: int, *rest: Any, **options: Any) -> Tensor:
    sizes = (reference.count(q.size(2), block), reference.count(k.size(2), block))
    return q.new_empty((q.size(0), q.size(1), *sizes), dtype=torch.float32)
