"""Attention that skips blocks which a gate did not choose, against dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from _table import Row, best_of
from torch import Tensor

from gatecc.ops.block_gate import block_choice, block_logits

N, HEADS, D, BLOCK = 8192, 2, 64, 64


def attention() -> Iterator[Row]:
    """The speed of block-sparse attention at 8192 tokens, gate included, by the share of blocks that is kept."""
    q, k, v = torch.randn(3, 1, HEADS, N, D).unbind()
    query, key = torch.randn(2, HEADS, 3 * D, 32).unbind()

    def chosen(share: float) -> Tensor:
        return block_choice(block_logits(q, k, query, key, None, BLOCK), torch.tensor(share), None, BLOCK, True, True)

    def sparse(share: float) -> Callable[[], Tensor]:
        options: dict[str, Any] = {"causal": True, "block_sizes": [BLOCK, BLOCK]}
        return lambda: torch.ops.gatecc.attention(q, k, v, blocks=chosen(share), **options)[0]

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    with torch.no_grad():
        few, half, full, gate = sparse(0.1), sparse(0.5), sparse(1.0), lambda: chosen(0.1)
        masked = _masked(q, k, v, chosen(0.1)[:, :, -4:])
        error = float((few()[:, :, -4 * BLOCK :] - masked).abs().max())
        seconds = best_of(dense, few, half, full, gate, repeats=3)
    what = f"attention, {N} tokens, {HEADS} heads of {D}, causal"
    yield Row(f"{what}: 10 % of the blocks kept, gate included", seconds[0] / seconds[1], 4.5, False, "x dense")
    yield Row("  half of the blocks kept", seconds[0] / seconds[2], 1.0, False, "x dense")
    yield Row("  all blocks kept", seconds[0] / seconds[3], unit="x dense")
    yield Row("  the gate's share of the time at 10 %", seconds[4] / seconds[1])
    yield Row("  skipped against masked, largest difference", error, 1e-5)


def _masked(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
    """The last queries, one row of the map for each block of them, with a mask over all keys."""
    rows = blocks.size(2) * BLOCK
    seen = blocks.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    at = torch.arange(N)
    seen = seen & (at <= at[-rows:, None])
    scores = (q[:, :, -rows:] @ k.mT) * D**-0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
