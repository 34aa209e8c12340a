"""PrefixSum: the sum of the values of all keys that a query sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.mask import Mask
from gatecc.ir.site import Attention, Site, Value
from gatecc.passes.axes import arranged
from gatecc.passes.branch.body import Body
from gatecc.passes.mix.mixers.packed import first_tokens, is_packed, kept
from gatecc.passes.mix.padding import token_mask
from gatecc.passes.operands import place, stage


@dataclass(frozen=True)
class PrefixSum(Body, tag="prefix_sum"):
    """The sum of the values of all keys that a query sees: of the earlier ones, of a window, of all (by the mask)."""

    @property
    def reads(self) -> tuple[str, ...]:
        return ("v",)

    @property
    def effects(self) -> Effects:
        return Effects(reads_mask=True, same_for_layers=True)

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        v = stage(site, "v")
        if not isinstance(site, Attention):
            raise SiteRefusedError("only attention sums values over keys", where=place(site), found=site.kind)
        causal, window = visible(site.mask, site)
        axis = v.axes.index("m" if "m" in v.axes else "n")
        have = v.axes.renamed("m", "n").text
        mask = _token_mask(site, have, edit)
        options = (axis, causal, window)
        if mask is None:
            total = edit.call(key_sum, v.node, *options, name="total")
        else:
            total = edit.call(kept_key_sum, v.node, mask, have.index("b"), *options, name="total")
        repeat = site.heads // site.kv_heads
        if have == value.axes and repeat == 1:
            return total
        return edit.call(arranged, total, have, value.axes.text, site.kv_heads, 1, repeat)


def visible(mask: Mask, site: Site) -> tuple[bool, int | None]:
    """Whether only earlier keys are seen, and how many of them. Raises SiteRefusedError for other masks."""
    if mask.kind in ("bidirectional", "causal", "sliding_window", "packed"):
        return mask.kind != "bidirectional", mask.window
    raise SiteRefusedError(
        "the keys that a query sees cannot be summed by their positions",
        where=place(site),
        found=f"the mask is {mask}" + (f": {mask.reason}" if mask.reason else ""),
        expected="a bidirectional, causal or sliding-window mask, with padding or packed rows",
        do="call the model with a mask of such a form, or leave this site out",
    )


def _token_mask(site: Attention, axes: str, edit: Editor) -> fx.Node | None:
    """See token_mask; None if every key is seen by all, or by all later queries."""
    mask, q = site.mask, stage(site, "q")
    if not (mask.padding or mask.asserted or mask.kind == "packed"):
        return None
    if q.axes[0] == axes[0] == "b":
        return token_mask(site, q.node, True, edit)
    raise SiteRefusedError(
        "the padding of a row cannot be told: samples and heads are one axis",
        where=place(site),
        found=f"queries with the axes {q.axes}, values with {axes}",
        expected="the batch first",
        do="call the model without a padding mask (sequences of one length), or leave this site out",
    )


def key_sum(v: torch.Tensor, axis: int, causal: bool, window: int | None) -> torch.Tensor:
    """Sums over the axis of keys: of all (its size becomes 1), of those up to each place, of the last ``window``."""
    if not causal:
        return v.sum(axis, keepdim=True)
    total = v.cumsum(axis)
    if window is None:
        return total
    left_out = torch.nn.functional.pad(total, [0, 0] * (v.dim() - 1 - axis) + [window, 0])
    return total - left_out.narrow(axis, 0, v.size(axis))


def kept_key_sum(
    v: torch.Tensor, mask: torch.Tensor, batch: int, axis: int, causal: bool, window: int | None
) -> torch.Tensor:
    """`key_sum` without padding, and in each sequence of a packed row. mask: see `token_mask`."""
    keep = kept(mask)
    assert keep is not None
    total = v.masked_fill(~_along(keep, v, batch, axis), 0)
    if not is_packed(mask):
        return key_sum(total, axis, causal, window)
    at = torch.arange(mask.size(1), device=mask.device)
    lower = torch.where(first_tokens(mask), at, 0).cummax(-1).values  # the first key, then one past the last
    after = torch.where(first_tokens(mask.flip(-1)), at, 0).cummax(-1).values.flip(-1)
    upper = (at if causal else mask.size(1) - 1 - after) + 1
    lower = lower if window is None else torch.maximum(lower, at + 1 - window)
    sums = torch.nn.functional.pad(total.cumsum(axis), [0, 0] * (v.dim() - 1 - axis) + [1, 0])
    ends = (_along(x.expand_as(mask), v, batch, axis).expand_as(v) for x in (upper, lower))
    return torch.sub(*(sums.gather(axis, end) for end in ends))


def _along(x: torch.Tensor, v: torch.Tensor, batch: int, axis: int) -> torch.Tensor:
    """x: (B, N) as a tensor that broadcasts against v."""
    return x.reshape([x.size({batch: 0, axis: 1}[i]) if i in (batch, axis) else 1 for i in range(v.dim())])
