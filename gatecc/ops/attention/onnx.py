"""``gatecc::attention`` in ONNX: the fused node where it says the same, else products and a softmax.

torch's fused attention has forms of its own (gatecc.codegen.onnx.attention), which leave soft caps and sinks out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.ops.attention.arguments import Arguments, read
from gatecc.ops.attention.reference import activated, masked, raw_scores, visible


def attention(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The arguments and the results are the operator's. The logsumexp costs nothing where nobody reads it."""
    a = read(tensors, options)
    out = _weighed(a) if a.softcap is not None or a.sinks is not None else _fused(a)
    if a.gate is not None:
        out = (out.to(a.wide) * activated(a.gate.to(a.wide), a.gate_activation)).to(a.q.dtype)
    return out, torch.logsumexp(_scores(a), -1)


def _fused(a: Arguments) -> Tensor:
    seen, bias = visible(a), a.bias
    if bias is not None and bias.dtype != torch.bool:
        seen = bias.to(a.q.dtype) if seen is None else torch.where(seen, bias.to(a.q.dtype), -torch.inf)
    return scaled_dot_product_attention(a.q, a.k, a.v, seen, scale=a.scale, enable_gqa=a.group > 1)


def _scores(a: Arguments) -> Tensor:
    scores = masked(a, raw_scores(a))
    if a.sinks is None:
        return scores
    sinks = a.sinks.to(a.wide)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat((scores, sinks), -1)


def _weighed(a: Arguments) -> Tensor:
    scores = _scores(a)
    blind = scores.amax(-1, keepdim=True) == -torch.inf
    weights = torch.softmax(torch.where(blind, 0.0, scores), -1).masked_fill(blind, 0.0)
    weights = weights[..., : a.k.size(2)].unflatten(1, (a.k.size(1), a.group)).flatten(2, 3)
    return (weights @ a.v.to(a.wide)).unflatten(2, (a.group, a.q.size(2))).flatten(1, 2).to(a.q.dtype)


LOWERING = Lowering(attention)
