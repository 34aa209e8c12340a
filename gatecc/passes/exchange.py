"""Exchange: two streams take from each other, at the same depth and in both directions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector, select
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.branch import add_scaled
from gatecc.passes.branch.cross_attention import Cross, CrossAttention, as_rows, flat
from gatecc.passes.gating import gate_node, reads_afar
from gatecc.passes.operands import beside, place, readers, stage, static_sizes

How = Literal["token", "mean", "attention"]


@dataclass(frozen=True)
class Exchange(Rewrite):
    """a <- a + g ⊙ U m(b) and b <- b + g' ⊙ U' m'(a), both from what a and b were before; every U starts at 0.

    ``site`` selects the values a of one stream, ``other`` those of the second, as many: the k-th with the k-th. m is
    what one stream reads of the other: with ``how="token"`` the same token, where both count the same ones; with
    ``"mean"`` the mean of its tokens; with ``"attention"`` attention with ``heads`` heads over all of them. The gates
    read a and m(b), ``fused(0)+fused(1)``, as ``gate`` says; each direction has modules of its own, on its own stream.
    """

    name = "exchange"

    other: str
    gate: GateSpec
    how: How = "token"
    heads: int = 4
    label: str = "exchange"

    def __post_init__(self) -> None:
        Selector.parse(self.other)
        if self.how not in ("token", "mean", "attention"):
            raise ArgumentError("no such exchange", found=f"how={self.how!r}", expected="token, mean or attention")
        if "expert" in self.gate.granularity.names or reads_afar(self.gate):
            raise ArgumentError(
                "the gate of an exchange reads the two streams, and weighs one value",
                found=str(self.gate),
                expected="fused(0)+fused(1), linear, element, sigmoid",
            )

    def contract(self) -> Contract:
        return identity_at_init()

    def effects(self) -> Effects:
        return Effects(whole_model=True, loses_cache=True)

    def notes(self, site: Site) -> Iterable[str]:
        yield f"{site.key}: it exchanges with {self.other}, so both streams run in step"

    def rewrite(self, site: Site, edit: Editor) -> None:
        theirs = self._partner(edit)
        wanted = Selector.parse(self.other)
        a, b = stage(site, self.site.stage), stage(theirs, wanted.stage)
        if a.node is b.node:
            raise SiteRefusedError("a stream exchanges with itself", where=place(site), do="select another stream")
        inside = replace(edit, site=theirs)
        new_a = self._taken(a, b, self.site, edit)
        new_b = self._taken(b, a, wanted, inside)
        edit.replace(a.node, new_a, readers(site, self.site.stage))
        inside.replace(b.node, new_b, readers(theirs, wanted.stage))

    def _partner(self, edit: Editor) -> Site:
        """The site of the other stream that has the same number among its own."""
        mine, theirs = select(self.site, edit.sites), select(Selector.parse(self.other), edit.sites)
        if len(mine) != len(theirs):
            raise SiteRefusedError(
                "the streams are not of one depth",
                where=place(edit.site),
                found=f"{len(mine)} sites of {self.site}, {len(theirs)} of {self.other}",
                expected="as many of both: the k-th exchanges with the k-th",
                do="select the layers that belong together",
            )
        return theirs[[site.key for site in mine].index(edit.site.key)]

    def _taken(self, own: Value, other: Value, selector: Selector, edit: Editor) -> fx.Node:
        """own + g ⊙ U m(other), on the owner of ``own``."""
        message = self._message(own, other, edit)
        channels, width = static_sizes(message)["c"], static_sizes(own)["c"]
        gate, _ = gate_node(self.gate, selector, own, edit, f"{self.label}_gate", fused=(own, message))
        path = edit.module(f"{self.label}_up", lambda: beside(_zero(channels, width), edit))
        up = edit.call(path, message.node, name=f"{self.label}_up")
        return edit.call(add_scaled, own.node, gate, up, name=f"with_{self.label}")

    def _message(self, own: Value, other: Value, edit: Editor) -> Value:
        """What one stream reads of the other, at the places of its own."""
        if not own.axes.text.endswith("c") or "c" not in static_sizes(own):
            raise SiteRefusedError(
                "streams exchange tokens with a fixed number of channels",
                where=place(edit.site),
                found=f"axes {own.axes}",
                expected="channels as the last axis",
                do="select the blocks of a transformer",
            )
        order = as_rows(other, edit.site)
        if self.how == "token":
            if own.axes != other.axes or own.node.meta["val"].shape[:-1] != other.node.meta["val"].shape[:-1]:
                raise SiteRefusedError(
                    "the streams count other tokens",
                    where=place(edit.site),
                    found=f"axes {own.axes} and {other.axes}, {_shape(own)} and {_shape(other)}",
                    expected="the same tokens in both",
                    do='how="mean" or how="attention"',
                )
            return other
        rows = edit.call(flat, other.node, order, name="memory")
        if self.how == "mean":
            return Value(edit.call(_mean, rows, own.node, name="message"), own.axes)
        sizes = static_sizes(own)["c"], static_sizes(other)["c"]
        if sizes[0] % self.heads:
            raise SiteRefusedError(
                "the heads do not divide the channels of the queries",
                where=place(edit.site),
                found=f"{sizes[0]} channels, {self.heads} heads",
                do="choose another number of heads",
            )
        spec = CrossAttention("self", self.heads)
        path = edit.module(f"{self.label}_attention", lambda: beside(Cross(spec, *sizes, sizes[0]), edit))
        return Value(edit.call(path, own.node, rows, name="message"), own.axes)


def _shape(value: Value) -> str:
    return str(tuple(value.node.meta["val"].shape))


def _mean(rows: Tensor, like: Tensor) -> Tensor:
    """rows: (B, M, C) -> their mean at every place of ``like`` (B, ..., C')."""
    mean = rows.mean(1)
    for _ in range(like.dim() - 2):
        mean = mean.unsqueeze(1)
    return mean.expand(*like.shape[:-1], mean.size(-1))


def _zero(channels: int, width: int) -> nn.Linear:
    made = nn.Linear(channels, width, bias=False)
    with torch.no_grad():
        made.weight.zero_()
    return made
