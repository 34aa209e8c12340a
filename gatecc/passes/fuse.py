"""Fuse: let a gate choose between two values that the graph adds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.activation import Sigmoid
from gatecc.ir.gates.init import Zero
from gatecc.ir.printer import node_text
from gatecc.ir.program import fake
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Residual, Site
from gatecc.passes.gating import gate_node, read_by, reads_afar
from gatecc.passes.operands import place, stage

_A = torch.ops.aten


def scaled_blend(one: torch.Tensor, other: torch.Tensor, gate: torch.Tensor, scale: float) -> torch.Tensor:
    """y <- scale * (g * one + (1 - g) * other)"""
    mixed = gate * one + (1 - gate) * other
    return mixed if scale == 1 else scale * mixed


@dataclass(frozen=True)
class Fuse(Rewrite):
    """Let a gate choose between two values: ``y <- scale * (g * v0 + (1 - g) * v1)`` in the place of ``v0 + v1``.

    ``site`` is the sum (``Residual[...].out``, ``Merge[...].out``), ``values`` its parts. With ``scale=2`` and a gate
    that starts at 1/2 (``sigmoid``, ``init=zero``) it is the sum at init. ``label`` names the gate's module.
    """

    name = "fuse"

    gate: GateSpec
    values: tuple[str, ...] = ("skip", "branch")
    scale: float = 1.0
    label: str = "gate"

    def __post_init__(self) -> None:
        if len(self.values) != 2:
            raise ArgumentError("fuse chooses between two values", found=str(self.values), expected="two stages")

    def contract(self) -> Contract:
        plain = isinstance(self.gate.activation, Sigmoid) and self.gate.activation == Sigmoid()
        half = plain and isinstance(self.gate.init, Zero) and not self.gate.estimator.binary
        return identity_at_init() if half and self.scale == 2 else changes_function()

    def effects(self) -> Effects:
        return Effects(same_for_layers=True, whole_model=reads_afar(self.gate))

    def reads(self) -> Iterable[str]:
        return (self.site.stage, *self.values, *read_by(self.gate))

    def rewrite(self, site: Site, edit: Editor) -> None:
        one, other = (stage(site, name) for name in self.values)
        out = stage(site, self.site.stage)
        _pure(site)
        gate, _ = gate_node(self.gate, self.site, out, edit, self.label)
        fused = edit.call(scaled_blend, one.node, other.node, gate, self.scale, name="fused")
        edit.replace(out.node, fused)


def _pure(site: Site) -> None:
    """An add in place is taken out of the graph with its result: it must not have changed a value that others read."""
    add = site.add if isinstance(site, Residual) else site.values["out"].node
    if add.target is not _A.add_.Tensor:
        return
    written = add.args[0]
    if not isinstance(written, fx.Node) or list(written.users) != [add] or fake(written) is None:
        raise SiteRefusedError(
            "the model adds in place to a value that it reads elsewhere too",
            where=place(site),
            found=node_text(add),
            do="write x = x + y in the model",
        )
    add.target = _A.add.Tensor
