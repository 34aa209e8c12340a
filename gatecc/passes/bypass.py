"""Bypass: let a gated part of a block's input through the block, and the rest around it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gatecc.ir.contract import Contract
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Site
from gatecc.passes.gating import gate_node, multiply, read_by, reads_afar
from gatecc.passes.operands import readers, stage


def add_rest(out: torch.Tensor, gate: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """y <- y + (1 - g) * x"""
    return out + (1 - gate) * given


@dataclass(frozen=True)
class Bypass(Rewrite):
    """Let a gated part of a block's input through it and the rest around it: ``y <- f(g * x) + (1 - g) * x``.

    The site must map a value to one of its shape: a Block, or an MLP. Where the gate is 1 everywhere the function is
    the original, bitwise. ``label`` names the gate's module on the owner.
    """

    name = "bypass"

    gate: GateSpec
    label: str = "gate"

    def contract(self) -> Contract:
        return self.gate.contract()

    def effects(self) -> Effects:
        return Effects(same_for_layers=True, whole_model=reads_afar(self.gate))

    def reads(self) -> Iterable[str]:
        return ("in", "out", *read_by(self.gate))

    def rewrite(self, site: Site, edit: Editor) -> None:
        given, out = stage(site, "in"), stage(site, "out")
        inside = readers(site, "in")
        gate, _ = gate_node(self.gate, self.site.in_, given, edit, self.label)
        edit.replace(given.node, edit.call(multiply, given.node, gate, name="through"), inside)
        edit.replace(out.node, edit.call(add_rest, out.node, gate, given.node, name="with_rest"))
