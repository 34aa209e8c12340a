"""Inputs of ``gatecc::attention`` for the tests, and its definition written out query by query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "G": 2},
    "more keys than queries": {"causal": True, "S": 9, "scale": 0.7},
    "more queries than keys": {"causal": True, "S": 4},
    "window": {"causal": True, "window": 3},
    "window to both sides": {"window": 2, "S": 8},
    "gate per head": {"gate": 1, "gate_activation": "sigmoid", "G": 1},
    "gate per element": {"gate": 3, "gate_activation": "silu", "E": 3, "causal": True},
    "gate as it is": {"gate": 3, "E": 3},
    "bias": {"bias": (1, 4, 6, 6), "softcap": 1.5},
    "bias of keys": {"bias": (2, 1, 1, 6), "causal": True},
    "padding": {"seen": (2, 1, 1, 6), "causal": True},
    "hidden keys": {"hidden": (2, 4, 6, 6)},
    "sinks": {"sinks": True, "causal": True, "window": 2, "G": 2},
    "blocks": {"blocks": (2, 1, 3, 2), "block_sizes": (2, 4), "G": 2},
    "blocks of each head": {
        "blocks": (1, 4, 2, 3), "block_sizes": (4, 3), "causal": True, "S": 9, "seen": (2, 1, 1, 9),
    },
    "everything": {
        "causal": True, "window": 4, "sinks": True, "softcap": 2.0, "hidden": (1, 4, 6, 6), "gate": 5, "G": 2, "E": 5,
        "gate_activation": "sigmoid",
    },
}  # fmt: skip


def operands(
    B: int = 2,
    H: int = 4,
    N: int = 6,
    D: int = 5,
    *,
    G: int = 0,
    S: int = 0,
    E: int = 0,
    gate: int = 0,
    bias: tuple[int, ...] = (),
    hidden: tuple[int, ...] = (),
    seen: tuple[int, ...] = (),
    sinks: bool = False,
    blocks: tuple[int, ...] = (),
    **options: Any,
) -> dict[str, Any]:
    """The arguments of a call in float64. ``bias``, ``hidden`` (with -inf in it) and ``seen`` (booleans): its shape;
    ``blocks``: that of the map."""
    heads, keys, width = G or H, S or N, E or D
    added: Tensor | None = torch.randn(bias or hidden) if bias or hidden else None
    if hidden and added is not None:
        added = added.masked_fill(torch.rand(hidden) < 0.4, -torch.inf)
    found: dict[str, Any] = {
        "q": torch.randn(B, H, N, D),
        "k": torch.randn(B, heads, keys, D),
        "v": torch.randn(B, heads, keys, width),
        "gate": torch.randn(B, H, N, gate) if gate else None,
        "bias": torch.rand(seen) < 0.6 if seen else added,
        "sinks": torch.randn(H) if sinks else None,
    }
    if blocks:
        found["blocks"] = torch.rand(blocks) < 0.6
    return {**to(found, torch.float64), **options}


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    gate_activation: str = "identity",
    blocks: Tensor | None = None,
    block_sizes: tuple[int, int] = (64, 64),
) -> tuple[Tensor, Tensor]:
    """The definition, a query at a time."""
    (B, H, N, D), (G, S) = q.shape, k.shape[1:3]
    rows: list[Tensor] = []
    sums: list[Tensor] = []
    whole = None if bias is None else bias.expand(B, H, N, S)
    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(N)):
        at, head = S - N + i, h // (H // G)
        terms, values = [q.new_zeros(()) if sinks is None else sinks[h].exp()], [q.new_zeros(v.size(3))]
        for j in range(S):
            near = window is None or (at - window < j and (causal or j < at + window))
            opened = (
                blocks is None or blocks[b % len(blocks), h % blocks.size(1), i // block_sizes[0], j // block_sizes[1]]
            )
            if (causal and j > at) or not near or not opened:
                continue
            score = (q[b, h, i] * k[b, head, j]).sum() * (D**-0.5 if scale is None else scale)
            score = score if softcap is None else softcap * (1 - 2 / ((2 * score / softcap).exp() + 1))
            if whole is not None:
                one = whole[b, h, i, j]
                if one.dtype == torch.bool and not one:
                    continue
                score = score if one.dtype == torch.bool else score + one
            terms.append(score.exp())
            values.append(terms[-1] * v[b, head, j])
        total = torch.stack(terms).sum()
        row = torch.stack(values).sum(0) / (total if total > 0 else 1)
        if gate is not None:
            g = gate[b, h, i]
            row = row * {"identity": g, "sigmoid": g.sigmoid(), "silu": g * g.sigmoid()}[gate_activation]
        rows.append(row)
        sums.append(total.log())
    return torch.stack(rows).view(B, H, N, -1), torch.stack(sums).view(B, H, N)


def to(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same in another dtype."""
    return {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in given.items()}


def leaves(given: dict[str, Any]) -> dict[str, Any]:
    """The same, with a gradient for every floating-point tensor."""
    return {
        n: v.detach().clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in given.items()
    }


def wanted(given: dict[str, Any]) -> list[Tensor]:
    """Those of ``leaves``."""
    return [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]
