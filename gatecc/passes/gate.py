"""Gate: multiply a value of a site by a gate, or blend it with another value of the site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import fx

from gatecc import ops as ops  # registers the operators that gates call by name, for ir lies below ops
from gatecc.ir.contract import Contract
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gate import GateShape, GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Site, Value
from gatecc.passes.fold_factor import fold_into_next
from gatecc.passes.gating import blend, gate_node, multiply, multiply_where, read_by, reads_afar
from gatecc.passes.operands import condition, readers, stage


@dataclass(frozen=True)
class Gate(Rewrite):
    """Multiply a value of a site by a gate: ``y <- g * y``; with op="lerp", ``y <- g * y + (1 - g) * skip``.

    ``site`` selects the value (``Attention[...].heads``, ``MLP[...].out``, ``Residual[...].branch``); ``gate`` says
    what the gate reads, how it is scored, what it varies over, and how it starts. ``skip`` names the other value of a
    lerp. ``where`` names an input of the model, a mask over tokens: the others are not gated. ``label`` names the new
    module on the owner. What is checked: identity, gradient, export, reversible (docs/checks.md).
    """

    name = "gate"

    gate: GateSpec
    op: Literal["mul", "lerp"] = "mul"
    skip: str = "skip"
    where: str = ""
    label: str = "gate"

    def contract(self) -> Contract:
        return self.gate.contract()

    def effects(self) -> Effects:
        return Effects(same_for_layers=True, whole_model=bool(self.where) or reads_afar(self.gate))

    def reads(self) -> Iterable[str]:
        return (self.site.stage, *read_by(self.gate), *((self.skip,) if self.op == "lerp" else ()))

    def rewrite(self, site: Site, edit: Editor) -> None:
        value = stage(site, self.site.stage)
        gate, at = gate_node(self.gate, self.site, value, edit, self.label)
        gated = self._gated(value, gate, at, edit)
        edit.replace(value.node, gated, readers(site, self.site.stage))
        if self.gate.fold_factor != 1:
            fold_into_next(edit, gated, self.gate.fold_factor)

    def _gated(self, value: Value, gate: fx.Node, at: GateShape, edit: Editor) -> fx.Node:
        name = f"{self.label}d"
        if self.op == "lerp":
            return edit.call(blend, value.node, stage(edit.site, self.skip).node, gate, name=name)
        if not self.where:
            return edit.call(multiply, value.node, gate, name=name)
        mask = condition(self.where, edit.program, value)
        return edit.call(multiply_where, value.node, gate, mask.node, mask.axes.positions.text, at, name=name)
