"""Scores: what is added to them, in attention that is one fused operator or spelled out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from gatecc.ir.edit import Editor
from gatecc.ir.ops import named
from gatecc.ir.site import Attention
from gatecc.passes.attention_edit.change import Change
from gatecc.passes.axes import arranged
from gatecc.passes.operands import stage


def add_to_scores(site: Attention, addend: fx.Node, change: Change, edit: Editor) -> fx.Node:
    """Let the softmax see ``scores + addend``; the node of the heads.

    addend: (B or 1, H or 1, N or 1, M), -inf for a key that is hidden.

    Attention that is one fused operator stays one, with the sum as its mask. Raises SiteRefusedError.
    """
    if site.spelling == "sdpa":
        operands = [named(site.core, name) for name in ("query", "key", "value")]
        names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        options = [named(site.core, name) for name in names]
        if len(operands[0].meta["val"].shape) != 4:
            raise change.refused(site, "queries without an axis for heads", "queries (B, H, N, D)")
        heads = edit.call(fused, *operands, addend, *options, name="heads")
        edit.replace(site.core, heads)
        return heads
    scores = stage(site, "scores")
    if sorted(scores.axes) not in (sorted("bhnm"), sorted("gnm")) or site.sinks:
        found = "a softmax that sees a sink" if site.sinks else f"scores with the axes {scores.axes}"
        raise change.refused(site, found, "scores (B, H, N, M), or with heads and batch as one axis")
    edit.replace(scores.node, edit.call(added, scores.node, addend, scores.axes.text, site.heads, name="scores"))
    return stage(site, "heads").node


def added(scores: Tensor, addend: Tensor, axes: str, heads: int) -> Tensor:
    """scores + addend, in the axes of the scores."""
    if "g" in axes:
        batch = scores.size(axes.index("g")) // heads
        addend = addend.expand(batch, heads, -1, -1)
    return scores + arranged(addend, "bhnm", axes).to(scores.dtype)


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    addend: Tensor,
    mask: Tensor | None,
    dropout: float | None,
    causal: bool | None,
    scale: float | None,
    gqa: bool | None,
) -> Tensor:
    """scaled_dot_product_attention whose scores have ``addend`` added beside their mask."""
    hidden: Any = None
    if causal:
        at = torch.arange(q.size(-2), device=q.device).unsqueeze(-1)
        hidden = torch.arange(k.size(-2), device=q.device) > at
    elif mask is not None and mask.dtype == torch.bool:
        hidden = ~mask
    elif mask is not None:
        addend = addend + mask
    if hidden is not None:
        addend = addend.masked_fill(hidden, float("-inf"))
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, addend.to(q.dtype), dropout or 0.0, False, scale=scale, enable_gqa=bool(gqa)
    )
