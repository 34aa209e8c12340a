"""Columns: further keys and values, of which every query sees all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.site import Attention
from gatecc.passes.attention_edit.change import Change
from gatecc.passes.branch.prefix import Prefix, Residual
from gatecc.passes.operands import stage


@dataclass(frozen=True)
class Columns(Change, tag="columns"):
    """``tokens`` learned keys and values for each key head, which join the softmax before those of the tokens.

    Their scores s become s + t2 act(t1 s) with ``residual`` (tanh, sigmoid, gelu) and two learned numbers that start
    at 1, the non-linear residual gate of NoRGa; without it this is prefix tuning. Nothing else that a query sees
    changes, but its share of the softmax. ``condition``, fused kernels, caches: see the body ``prefix`` of a branch.
    """

    tokens: int = 16
    residual: Residual = "none"
    condition: str | None = None

    def check(self) -> None:
        self.require(self.tokens > 0, "tokens", "a positive integer")

    @property
    def _prefix(self) -> Prefix:
        return Prefix(self.tokens, "joint", self.condition, self.residual)

    @property
    def reads(self) -> tuple[str, ...]:
        return self._prefix.reads

    @property
    def effects(self) -> Effects:
        return self._prefix.effects

    def notes(self, site: Attention) -> Iterable[str]:
        return self._prefix.notes(site, site.values["heads"])

    def apply(self, site: Attention, label: str, edit: Editor) -> None:
        heads = stage(site, "heads")
        edit.replace(heads.node, self._prefix.build(site, heads, edit))
