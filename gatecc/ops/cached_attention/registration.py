"""What ONNX knows of ``gatecc::cached_attention``: its form in operators that every target has.

ONNX Runtime's one node of it is put there by `gatecc.codegen.onnx.lower`, which also takes the rotary embedding in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.ops.cached_attention import operator as operator  # defines the operator
from gatecc.ops.registry import Operator, register


def spelled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values put behind one another, where the mask says that each row ends, and attention with a mask."""
    keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    places = torch.arange(keys.size(2), device=q.device)
    if mask is None:
        queries = torch.arange(past_k.size(2), keys.size(2), device=q.device)[:, None]  # (T, 1)
    else:
        first = (mask.sum(1, keepdim=True) - q.size(2)).clamp(min=0)  # (B, 1), the place of each row's first new token
        at = first + torch.arange(q.size(2), device=q.device)
        keys, values = (_placed(whole, new, at) for whole, new in ((keys, k), (values, v)))
        queries = at[:, None, :, None]
    seen = places <= queries
    if window:
        seen = seen & (places > queries - window)
    group = q.size(1) // k.size(1)
    every_k, every_v = (x if group == 1 else x.repeat_interleave(group, 1) for x in (keys, values))
    if not softcap:
        return torch.nn.functional.scaled_dot_product_attention(q, every_k, every_v, seen, scale=scale), keys, values
    scores = softcap * torch.tanh((q * scale) @ every_k.mT / softcap)
    return torch.where(seen, scores, -torch.inf).softmax(-1) @ every_v, keys, values


def _placed(whole: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """New keys where they belong: (B, K, M, D), (B, K, T, D) and (B, T) -> (B, K, M, D)."""
    return whole.scatter(2, at[:, None, :, None].expand_as(new), new)


register(Operator(overload=torch.ops.gatecc.cached_attention.default, onnx={"portable": Lowering(spelled)}))
