"""Attention as a call of ``gatecc::attention``, which takes a map of blocks and skips what is not in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.program import shape
from gatecc.ir.site import Attention
from gatecc.passes.attention_edit.change import Change
from gatecc.passes.axes import arranged
from gatecc.passes.mix.mix import laid
from gatecc.passes.mix.padding import token_mask
from gatecc.passes.operands import place, stage


class Operands(NamedTuple):
    """q: (B, H, N, D), k: (B, G, N, D), v: (B, G, N, E), bias: four axes, or None where the mask's kind says it all."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    bias: fx.Node | None


def operands(site: Attention, change: Change, edit: Editor) -> Operands:
    """What the operator reads in the place of a site. Raises SiteRefusedError where it computes something else."""
    mask = site.mask
    wrong = [
        ("queries and keys of different sequences", site.cross),
        ("a scale that is not a constant", site.scale is None),
        ("a softmax that sees a sink", site.sinks),
        (f"the mask is {mask}: {mask.reason}", mask.kind == "unknown"),
        ("a window in both directions", mask.kind == "sliding_window" and not mask.causal),
    ]
    for found, holds in wrong:
        if holds:
            raise change.refused(site, found, "self-attention softmax(scale q k + mask) v whose mask is proved")
    q, k, v = (laid(stage(site, name), site, name, edit) for name in "qkv")
    return Operands(q, k, v, _bias(site, change, edit))


def _bias(site: Attention, change: Change, edit: Editor) -> fx.Node | None:
    mask = site.mask
    if not (mask.padding or mask.bias or mask.asserted or mask.kind == "packed"):
        return None
    nodes, hows = [m.node for m in site.maskings], tuple(m.how for m in site.maskings)
    if not nodes or not site.mask_whole or any(m.rank != 4 or len(shape(m.node)) > 4 for m in site.maskings):
        raise change.refused(site, f"the mask is {mask}, of another form", "masks over (B, H, N, N) or their last axes")
    return edit.call(combined, hows, *nodes, name="mask")


def combined(hows: tuple[str, ...], *masks: Tensor) -> Tensor:
    """All that meets the scores as one addend or one boolean mask, four axes."""
    hidden: Tensor | None = None
    total: Tensor | None = None
    for how, mask in zip(hows, masks, strict=True):
        mask = mask[(None,) * (4 - mask.dim())]
        if mask.dtype == torch.bool:
            mask = mask if how == "hidden" else ~mask
            hidden = mask if hidden is None else hidden | mask
        else:
            mask = -mask if how == "subtracted" else mask
            total = mask if total is None else total + mask
    if total is None:
        assert hidden is not None
        return ~hidden
    return total if hidden is None else total.masked_fill(hidden, float("-inf"))


def keeps(site: Attention, q: fx.Node, edit: Editor) -> fx.Node | None:
    """Which tokens are no padding, (B, N) of bool; None if all are."""
    found = token_mask(site, q, True, edit) if site.mask.kind == "packed" else token_mask(site, q, False, edit)
    if found is None or found.meta["val"].dtype == torch.bool:
        return found
    return edit.call(_is_token, found, name="keep")


def _is_token(numbers: Tensor) -> Tensor:
    return numbers > 0


def attend(site: Attention, given: Operands, blocks: fx.Node, block: int, edit: Editor) -> fx.Node:
    """Attention to the blocks of a map, in the axes of the site's heads."""
    if site.dropout:
        raise SiteRefusedError(
            "attention to chosen blocks drops no weights",
            where=place(site),
            found=f"dropout {site.dropout:g} of the weights",
            do="set the attention's dropout to 0, or train the gates alone (joint=False)",
        )
    rules = (site.mask.causal and given.bias is None, site.mask.window if given.bias is None else None)
    out = edit.call(called, *given[:3], blocks, given.bias, block, site.scale, *rules, site.soft_cap, name="heads")
    return laid_back(out, site, edit)


def laid_back(out: fx.Node, site: Attention, edit: Editor) -> fx.Node:
    """A result (B, H, N, D) in the axes and the dtype of the site's heads. Raises SiteRefusedError."""
    heads = stage(site, "heads")
    if sorted(heads.axes.apart.renamed("r", "")) != sorted("bhnd"):
        raise SiteRefusedError(
            "the heads are laid out in a way that is not known", where=place(site), found=f"axes {heads.axes}"
        )
    groups = site.heads // site.kv_heads if "r" in heads.axes else 1
    if heads.axes != "bhnd":
        out = edit.call(arranged, out, "bhnd", heads.axes.text, 1, groups, name="heads")
    dtype = heads.node.meta["val"].dtype
    return out if out.meta["val"].dtype == dtype else edit.call(torch.ops.aten.to.dtype, out, dtype)


def called(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    block: int,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The operator's result. blocks: (B, H, n, n)."""
    options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap}
    sizes = [block, block]
    return torch.ops.gatecc.attention(
        q, k, v, None, bias, None, scale=scale, blocks=blocks, block_sizes=sizes, **options
    )[0]
