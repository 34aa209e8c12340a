"""Attention: scaled dot product attention as one ONNX node where ONNX Runtime has it right, else spelled out.

Opset 23 has Attention. torch.onnx writes it for four axes and equal heads alone. ONNX Runtime's kernel takes a size of
1 along the queries of a mask for an error, has no float64, needs a positive scale, and takes the lowest finite number
in a mask, which leaves a row uniform in torch, for minus infinity.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.onnx.stable import Form

ATTENTION: Any = torch.ops.aten.scaled_dot_product_attention.default
_SINCE = 23


def attention(opset: int) -> Form:
    """The decomposition of ATTENTION for an opset."""

    def form(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if dropout > 0:
            return NotImplemented
        if enable_gqa:
            k, v = (_repeated(x, q.size(-3)) for x in (k, v))
        q, k, v = _one_batch(q, k, v)
        factor = q.size(-1) ** -0.5 if scale is None else scale
        plain = mask is None or mask.dtype == torch.bool
        known = q.dtype in (torch.float32, torch.float16) and isinstance(factor, float) and factor > 0
        if opset < _SINCE or q.dim() != 4 or not (plain and known):
            return _spelled_out(q, k, v, mask, causal, factor)
        return _node(q, k, v, mask, causal, factor)

    return form


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.size(-3) == heads else x.repeat_interleave(heads // x.size(-3), -3)


def _one_batch(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All with the same axes before the last two: torch broadcasts them (the one key head of multi-query attention)."""
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (x if x.shape[:-2] == batch else x.expand(*batch, *x.shape[-2:]) for x in (q, k, v))
    return q, k, v


def _node(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, factor: float) -> Tensor:
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], q.size(-2), k.size(-2))
    return torch.onnx.ops.symbolic(
        "Attention",
        [q, k, v] if mask is None else [q, k, v, mask],
        attrs={"is_causal": int(causal), "scale": factor},
        dtype=q.dtype,
        shape=(*q.shape[:-1], v.size(-1)),
        version=_SINCE,
    )


def _spelled_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, factor: float) -> Tensor:
    """softmax(q k^T) v; as in torch, a query that may see nothing gets zeros."""
    scores = (q * factor) @ k.mT
    if causal:
        places = torch.arange(k.size(-2), device=q.device)
        mask = places <= torch.arange(q.size(-2), device=q.device)[:, None]
    if mask is None:
        return torch.softmax(scores, -1) @ v
    scores = torch.where(mask, scores, -math.inf) if mask.dtype == torch.bool else scores + mask
    blind = scores.amax(-1, keepdim=True) == -math.inf
    return torch.softmax(torch.where(blind, 0.0, scores), -1).masked_fill(blind, 0.0) @ v
