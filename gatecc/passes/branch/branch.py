"""Branch: add a parallel sub-graph to a value of a site, or put it in the value's place; a gate may scale it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.init import Zero
from gatecc.ir.gates.option import Option
from gatecc.ir.mask import Mask
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Attention, Site, Value
from gatecc.passes.axes import arranged
from gatecc.passes.gating import blend, gate_node, read_by, reads_afar
from gatecc.passes.mix.mixers.packed import first_tokens, is_packed, kept
from gatecc.passes.mix.padding import token_mask
from gatecc.passes.operands import place, readers, stage


@dataclass(frozen=True)
class Body(Option, slot="body"):
    """Base of the sub-graphs that a branch can be."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Stages of the site beside the value."""
        return ()

    @property
    def effects(self) -> Effects:
        """What a branch with this body gives up, needs and promises."""
        return Effects()

    @property
    def starts_at_zero(self) -> bool:
        """Whether the sub-graph yields exactly 0 when it is fresh."""
        return False

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        """Insert the sub-graph; its result broadcasts against ``value``."""
        raise NotImplementedError

    def notes(self, site: Site, value: Value) -> Iterable[str]:
        """What a report should say of it, see `Rewrite.notes`."""
        return ()


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


def add_scaled(value: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """y <- y + g * branch"""
    return value + gate * branch


def add(value: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """y <- y + branch"""
    return value + branch


@dataclass(frozen=True)
class Branch(Rewrite):
    """Add a parallel sub-graph to a value, scaled by a gate if there is one: ``y <- y + g * body``.

    With ``op="lerp"`` the body takes the value's place: ``y <- y + g * (body - y)``, the body itself without a gate. A
    gate that starts at 0 (``init=zero`` and an activation that is 0 at 0), or a body that does and is added, makes it
    the identity at init. ``label`` names the gate's module on the owner.
    """

    name = "branch"

    body: Body
    gate: GateSpec | None = None
    label: str = "branch"
    op: Literal["add", "lerp"] = "add"

    def effects(self) -> Effects:
        afar = bool(self.gate and reads_afar(self.gate))
        return replace(self.body.effects, whole_model=afar or self.body.effects.whole_model)

    def contract(self) -> Contract:
        zero = starts_at_zero(self.gate) if self.gate else self.op == "add" and self.body.starts_at_zero
        return identity_at_init() if zero else changes_function()

    def notes(self, site: Site) -> Iterable[str]:
        value = site.find(self.site.stage)
        return () if value is None else self.body.notes(site, value)

    def reads(self) -> Iterable[str]:
        return (self.site.stage, *self.body.reads, *(read_by(self.gate) if self.gate else ()))

    def rewrite(self, site: Site, edit: Editor) -> None:
        value = stage(site, self.site.stage)
        branch = self.body.build(site, value, edit)
        joined = self._joined(value, branch, edit)
        edit.replace(value.node, joined, readers(site, self.site.stage))

    def _joined(self, value: Value, branch: fx.Node, edit: Editor) -> fx.Node:
        name = f"with_{self.label}"
        if self.gate is None:
            return branch if self.op == "lerp" else edit.call(add, value.node, branch, name=name)
        gate, _ = gate_node(self.gate, self.site, value, edit, self.label)
        if self.op == "lerp":
            return edit.call(blend, branch, value.node, gate, name=name)
        return edit.call(add_scaled, value.node, gate, branch, name=name)


def starts_at_zero(spec: GateSpec) -> bool:
    """Whether a fresh gate is exactly 0."""
    if not isinstance(spec.init, Zero) or not spec.scorer.trained or spec.activation.many:
        return False
    start: Any = spec.estimator.decide(torch.zeros(2), spec.activation)
    return bool((start == 0).all())
