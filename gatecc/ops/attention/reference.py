"""Attention in ATen, its scores written out: the definition, every derivative of it, and what runs without a kernel.

Memory grows with N * S.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gatecc.ops.attention.arguments import Arguments, GateActivation


def attention(a: Arguments) -> tuple[Tensor, Tensor]:
    """The result, (B, H, N, E) in q's dtype, and the logarithm of each query's sum, (B, H, N)."""
    (B, H, N, _), S, E = a.q.shape, a.k.size(2), a.v.size(3)
    scores = masked(a, raw_scores(a))
    largest = scores.detach().amax(-1, keepdim=True) if S else scores.new_full((B, H, N, 1), -math.inf)
    if a.sinks is not None:
        largest = torch.maximum(largest, a.sinks.detach().to(a.wide)[:, None, None])
    shift = torch.where(largest == -math.inf, 0.0, largest)  # of a query that sees nothing
    powers = torch.exp(scores - shift)
    total = powers.sum(-1, keepdim=True)
    if a.sinks is not None:
        total = total + torch.exp(a.sinks.to(a.wide)[:, None, None] - shift)
    blind = total == 0
    weights = powers / torch.where(blind, 1.0, total)
    grouped = weights.unflatten(1, (a.k.size(1), a.group)).flatten(2, 3)
    heads = (grouped @ a.v.to(a.wide)).unflatten(2, (a.group, N)).flatten(1, 2)
    if a.gate is not None:
        heads = heads * activated(a.gate.to(a.wide), a.gate_activation)
    logsumexp = (shift + torch.log(torch.where(blind, 0.0, total))).squeeze(-1)
    out = heads.to(a.q.dtype).transpose(1, 2).contiguous()
    return out.view(B, N, H, E).transpose(1, 2), logsumexp


def raw_scores(a: Arguments) -> Tensor:
    """scale * q k^T, capped, in float32 (float64): (B, H, N, S). No key is repeated."""
    q = (a.q.to(a.wide) * a.scale).unflatten(1, (a.k.size(1), a.group)).flatten(2, 3)
    scores = (q @ a.k.to(a.wide).mT).unflatten(2, (a.group, a.q.size(2))).flatten(1, 2)
    return scores if a.softcap is None else a.softcap * torch.tanh(scores / a.softcap)


def masked(a: Arguments, scores: Tensor) -> Tensor:
    """The scores with the bias, -inf where a query may not see a key."""
    if a.bias is not None and a.bias.dtype != torch.bool:
        scores = scores + a.bias.to(a.wide)
    seen = visible(a)
    return scores if seen is None else torch.where(seen, scores, -math.inf)


def visible(a: Arguments) -> Tensor | None:
    """Where queries see keys, broadcast to (B, H, N, S); None for everywhere."""
    seen = a.bias if a.bias is not None and a.bias.dtype == torch.bool else None
    if a.blocks is not None:
        rows, columns = (torch.arange(n, device=a.q.device) for n in (a.q.size(2), a.k.size(2)))
        opened = a.blocks[:, :, rows[:, None] // a.block_sizes[0], columns // a.block_sizes[1]]
        seen = opened if seen is None else seen & opened
    if a.causal or a.window is not None:
        N, S = a.q.size(2), a.k.size(2)
        ahead = torch.arange(S, device=a.q.device) - torch.arange(S - N, S, device=a.q.device)[:, None]
        rules = [ahead <= 0] if a.causal else []
        if a.window is not None:
            rules.append(ahead > -a.window)
            if not a.causal:
                rules.append(ahead < a.window)
        for rule in rules:
            seen = rule if seen is None else seen & rule
    return seen


def activated(gate: Tensor, activation: GateActivation) -> Tensor:
    """What the result is multiplied by."""
    if activation == "sigmoid":
        return torch.sigmoid(gate)
    return gate * torch.sigmoid(gate) if activation == "silu" else gate
