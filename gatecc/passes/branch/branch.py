"""Branch: a parallel sub-graph that is added to a value of a site, takes its place, or is concatenated to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from gatecc.errors import ArgumentError
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.init import Zero
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.body import Bank, Body
from gatecc.passes.branch.concatenation import concatenate
from gatecc.passes.gating import blend, gate_node, multiply, read_by, reads_afar
from gatecc.passes.operands import readers, stage
from gatecc.passes.route.router_nodes import router_nodes


def add_scaled(value: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """y <- y + g * branch"""
    return value + gate * branch


def add(value: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """y <- y + branch"""
    return value + branch


@dataclass(frozen=True)
class Branch(Rewrite):
    """Add a parallel sub-graph to a value, scaled by a gate if there is one: ``y <- y + g * body``.

    A body that is a bank of experts needs a gate over experts, ``y <- y + sum_e g_e * body_e``, or a ``router``, and
    then the experts that it does not choose for a position do not run there.

    With ``op="lerp"`` the body takes the value's place: ``y <- y + g * (body - y)``, the body itself without a gate. A
    gate that starts at 0 (``init=zero`` and an activation that is 0 at 0), or a body that does and is added, makes it
    the identity at init. ``label`` names the gate's module on the owner.

    With ``op="cat"`` the result comes behind the value's channels, ``[y, g * body]``. All readers of the value have to
    be Linears; their weights get columns for it, so that a KV cache object cannot be passed any more. The columns start
    at 0, or at random where the body or the gate does, which is the identity at init as well.
    """

    name = "branch"

    body: Body
    gate: GateSpec | None = None
    label: str = "branch"
    op: Literal["add", "lerp", "cat"] = "add"

    router: RouterSpec | None = None

    def __post_init__(self) -> None:
        over = self.gate is not None and "expert" in self.gate.granularity.names
        weighed = over + (self.router is not None)
        if weighed > 1 or isinstance(self.body, Bank) != bool(weighed) or (self.router and self.gate):
            raise ArgumentError(
                "a bank of experts is weighed by a gate over experts or by a router, and nothing else is",
                found=f"body={self.body}, gate={self.gate}, router={self.router}",
                expected='a bank, and a gate of the granularity "expert" ("in, linear, expert, softmax") or a router '
                '("in, linear, softmax_topk(2)")',
            )
        if self.op not in self.body.ops:
            expected = ", ".join(f'op="{op}"' for op in self.body.ops)
            raise ArgumentError(f"{self.body} meets the value otherwise", found=f'op="{self.op}"', expected=expected)

    def effects(self) -> Effects:
        afar = any(reads_afar(spec) for spec in self._gates) or bool(self.router and self.router.mask)
        return replace(self.body.effects, whole_model=afar or self.body.effects.whole_model)

    def contract(self) -> Contract:
        stays = {"add": self._zero, "lerp": self.gate is not None and starts_at_zero(self.gate), "cat": True}
        return identity_at_init() if stays[self.op] else changes_function()

    @property
    def _zero(self) -> bool:
        return self.body.starts_at_zero or (self.gate is not None and starts_at_zero(self.gate))

    def notes(self, site: Site) -> Iterable[str]:
        value = site.find(self.site.stage)
        routed = [f"{site.key}: {note}" for note in self.router.notes] if self.router else []
        return routed if value is None else [*self.body.notes(site, value), *routed]

    def reads(self) -> Iterable[str]:
        return (self.site.stage, *self.body.reads, *(name for spec in self._gates for name in read_by(spec)))

    @property
    def _gates(self) -> list[GateSpec]:
        return [spec for spec in (self.gate, self.router and self.router.gate) if spec is not None]

    def rewrite(self, site: Site, edit: Editor) -> None:
        value = stage(site, self.site.stage)
        if self.op == "cat":
            concatenate(value, self._scaled(value, edit), self.site.stage, self._zero, edit)
            return
        if isinstance(self.body, Bank):
            joined = edit.call(add, value.node, self._mixed(self.body, value, edit), name=f"with_{self.label}")
        else:
            joined = self._joined(value, self.body.build(site, value, edit), edit)
        edit.replace(value.node, joined, readers(site, self.site.stage))

    def _mixed(self, bank: Bank, value: Value, edit: Editor) -> fx.Node:
        if self.router is not None:
            chosen = router_nodes(self.router, bank.experts, self.site, value, edit, self.label)
            return bank.mix(edit.site, value, edit, *chosen)
        assert self.gate is not None  # see __post_init__
        weights, _ = gate_node(self.gate, self.site, value, edit, self.label, bank.scores)
        return bank.mix(edit.site, value, edit, weights)

    def _joined(self, value: Value, branch: fx.Node, edit: Editor) -> fx.Node:
        name = f"with_{self.label}"
        if self.gate is None:
            return branch if self.op == "lerp" else edit.call(add, value.node, branch, name=name)
        gate, _ = gate_node(self.gate, self.site, value, edit, self.label)
        if self.op == "lerp":
            return edit.call(blend, branch, value.node, gate, name=name)
        return edit.call(add_scaled, value.node, gate, branch, name=name)

    def _scaled(self, value: Value, edit: Editor) -> fx.Node:
        """The branch alone, times its gate."""
        branch = self.body.build(edit.site, value, edit)
        if self.gate is None:
            return branch
        gate, _ = gate_node(self.gate, self.site, value, edit, self.label)
        return edit.call(multiply, branch, gate, name=self.label)


def starts_at_zero(spec: GateSpec) -> bool:
    """Whether a fresh gate is exactly 0."""
    if not isinstance(spec.init, Zero) or not spec.scorer.trained or spec.activation.many:
        return False
    start: Any = spec.estimator.decide(torch.zeros(2), spec.activation)
    return bool((start == 0).all())
