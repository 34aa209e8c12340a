"""Fuse: let a gate weigh several values, of the site, of other sites and streams, or new ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import ROUNDING, Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.activation import Sigmoid
from gatecc.ir.gates.init import Zero
from gatecc.ir.gates.source import Source, Stage
from gatecc.ir.printer import node_text
from gatecc.ir.program import fake, shape
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Residual, Site, Value
from gatecc.ir.sizes import described_shape
from gatecc.passes.branch.body import Body
from gatecc.passes.branch.branch import starts_at_zero
from gatecc.passes.fusing import (
    Operand,
    check_alike,
    operand_of,
    scaled_blend,
    sums_to_one,
    value_of,
    weight_of,
    weighted_sum,
)
from gatecc.passes.gating import gate_node, multiply, read_by, reads_afar
from gatecc.passes.operands import place, readers, stage

_A = torch.ops.aten


@dataclass(frozen=True)
class Fuse(Rewrite):
    """Let a gate weigh several values, whose sum takes the place of the value that ``site`` selects.

    With ``mode="convex"`` the weights are shares: ``y <- scale * (g * v0 + (1 - g) * v1)`` for two values, ``y <- scale
    * sum_i g_i * v_i`` for any number with a gate over them (granularity ``expert``, a softmax). ``"free"``: ``y <-
    scale * sum_i g_i * v_i``, weights of any size. ``"add"``: ``y <- v0 + scale * (g_1 * v1 + ...)``, so that v0 comes
    through whole. Where the gate of these two is not over the values, each value has a gate of its own. ``"scale"``
    sums nothing: the site, a concatenation, reads ``g_i * v_i`` in the place of each value, with one gate over them.

    ``values``: stages of the site (``skip``; ``self`` is the selected value), values of other sites
    (``at("block[b.*].out")``: one for all, or the k-th for the k-th), inputs of the model (``cond(text)``), or new
    ones, the bodies of branches (``lora(4)``). All have the shape of the selected value. The gate may read each,
    ``fused(0)+fused(1)``. With ``everywhere`` the sum takes the place of every value, not of the selected one alone:
    several models go on from one.

    With ``scale=2`` and a gate that starts at 1/2 (``sigmoid``, ``init=zero``) the fusion of the parts of a sum is the
    sum at init. ``label`` names the gate's module. A fusion computes all of its values, whatever the gate says.
    """

    name = "fuse"

    gate: GateSpec
    values: tuple[str, ...] = ("skip", "branch")
    scale: float = 1.0
    label: str = "gate"
    mode: Literal["convex", "free", "add", "scale"] = "convex"
    everywhere: bool = False

    def __post_init__(self) -> None:
        given = (self.values,) if isinstance(self.values, str | Source | Body) else self.values  # one is refused below
        object.__setattr__(self, "values", tuple(str(operand_of(str(one))) for one in given))
        if self.mode not in ("convex", "free", "add", "scale"):
            raise ArgumentError("no such fusion", found=f"mode={self.mode!r}", expected="convex, free, add or scale")
        if self.mode == "scale" and (not self._over_values or self.everywhere or self.scale != 1):
            raise ArgumentError(
                "values are scaled in their places by one gate over them",
                found=f"granularity {self.gate.granularity}, scale={self.scale}, everywhere={self.everywhere}",
                expected='"..., mlp(64), expert, sigmoid" and no other option',
            )
        if len(self.values) < 2:
            raise ArgumentError("fuse weighs several values", found=str(self.values), expected="two values or more")
        if self.everywhere and any(isinstance(one, Body) for one in self._operands):
            raise ArgumentError(
                "everywhere is where a value was before", found=str(self.values), expected="no new values"
            )
        if self.mode != "convex":
            return
        start = self.gate.start
        if start is not None and start.activation != self.gate.activation:
            raise ArgumentError(
                "the shares of a convex fusion lie between 0 and 1",
                found=f"a gate that starts at 1 as {start.activation}",
                expected="init=identity(how=bias), zero, or random",
            )
        if not self._over_values and len(self.values) > 2:
            raise ArgumentError(
                "the shares of more than two values come from a gate over the values",
                found=f"granularity {self.gate.granularity}, {len(self.values)} values",
                expected='"..., linear, expert, softmax", or mode="free"',
            )
        if self._over_values and not sums_to_one(self.gate, len(self.values)):
            raise ArgumentError(
                "the weights of a convex fusion sum to 1",
                found=f"activation {self.gate.activation}",
                expected='softmax, topk, normalized or sinkhorn, or mode="free"',
            )

    @property
    def _operands(self) -> list[Operand]:
        return [operand_of(text) for text in self.values]

    @property
    def _over_values(self) -> bool:
        return "expert" in self.gate.granularity.names

    def contract(self) -> Contract:
        if self.mode == "scale":
            return self.gate.contract()
        first, *others = self._operands
        kept = isinstance(first, Stage) and first.name in ("self", self.site.stage)
        if self.mode == "add":
            zero = starts_at_zero(self.gate) or all(isinstance(v, Body) and v.starts_at_zero for v in others)
            return identity_at_init() if kept and zero else changes_function()
        if self.mode == "convex" and kept and self.gate.start is not None and self.gate.residual <= ROUNDING:
            return identity_at_init()
        parts = {"residual": {"skip", "branch"}, "merge": {"in0", "in1"}}.get(self.site.kind)
        whole = self.site.stage == "out" and set(self.values) == parts and len(self.values) == 2
        if self.mode == "free":
            return self.gate.contract() if whole and self.scale == 1 else changes_function()
        plain = isinstance(self.gate.activation, Sigmoid) and self.gate.activation == Sigmoid()
        half = plain and isinstance(self.gate.init, Zero) and not self.gate.estimator.binary and not self._over_values
        return identity_at_init() if half and whole and self.scale == 2 else changes_function()

    def effects(self) -> Effects:
        bodies = [one for one in self._operands if isinstance(one, Body)]
        afar = any(isinstance(one, Source) and not isinstance(one, Stage) for one in self._operands)
        held = [body.effects for body in bodies]
        return Effects(
            same_for_layers=all(one.same_for_layers for one in held),
            whole_model=afar or reads_afar(self.gate) or any(one.whole_model for one in held),
            loses_cache=any(one.loses_cache for one in held),
            reads_mask=any(one.reads_mask for one in held),
        )

    def reads(self) -> Iterable[str]:
        stages = [one.name for one in self._operands if isinstance(one, Stage) and one.name != "self"]
        inside = [name for one in self._operands if isinstance(one, Body) for name in one.reads]
        return (self.site.stage, *stages, *inside, *read_by(self.gate))

    def notes(self, site: Site) -> Iterable[str]:
        value = site.find(self.site.stage)
        bodies = [one for one in self._operands if isinstance(one, Body)]
        return [] if value is None else [note for body in bodies for note in body.notes(site, value)]

    def rewrite(self, site: Site, edit: Editor) -> None:
        out = stage(site, self.site.stage)
        values = [value_of(operand, self.site, edit) for operand in self._operands]
        if self.mode == "scale":
            self._scale(values, out, edit)
            return
        check_alike(values, out, self.values, site)
        _pure(site, out)
        fused = self._fused(values, out, edit)
        edit.replace(out.node, fused, readers(site, self.site.stage))
        for value in values if self.everywhere else ():
            if value.node is not out.node:
                edit.replace(value.node, fused)

    def _scale(self, values: list[Value], out: Value, edit: Editor) -> None:
        gates = self._gates(values, values, out, edit)
        for name, value, gate in zip(self.values, values, gates, strict=True):
            varies = any(size != 1 for size in shape(gate)[1:])
            if value.axes != out.axes or out.node not in value.node.users or varies:
                raise SiteRefusedError(
                    "only what a concatenation of tokens reads is scaled in its place, by a weight for each sample",
                    where=place(edit.site),
                    found=f"{name} with the axes {value.axes}, a gate {described_shape(gate)}",
                    expected="a part of the site, and a gate that reads inputs or pooled values",
                    do="select the join (merge[0].out) and name its parts (in0, in1)",
                )
        for value, gate in zip(values, gates, strict=True):
            scaled = edit.call(multiply, value.node, gate, name="scaled")
            edit.replace(value.node, scaled, {out.node})

    def _fused(self, values: list[Value], out: Value, edit: Editor) -> fx.Node:
        if self.mode == "convex" and not self._over_values:
            one, other = (value.node for value in values)
            gate, _ = gate_node(self.gate, self.site, out, edit, self.label, fused=values)
            return edit.call(scaled_blend, one, other, gate, self.scale, name="fused")
        added = self.mode == "add"
        weighed = values[1:] if added else values
        gates = self._gates(weighed, values, out, edit)
        pairs = [node for gate, value in zip(gates, weighed, strict=True) for node in (gate, value.node)]
        return edit.call(weighted_sum, self.scale, added, values[0].node, *pairs, name="fused")

    def _gates(self, weighed: list[Value], values: list[Value], out: Value, edit: Editor) -> list[fx.Node]:
        """A gate for each of the values that are weighed."""
        if not self._over_values:
            return [gate_node(self.gate, self.site, out, edit, self.label, fused=values)[0] for _ in weighed]
        if "g" in out.axes or "e" in out.axes:
            raise SiteRefusedError(
                "values that merge samples and heads, or that count experts, have no place for weights of their own",
                where=place(edit.site),
                found=f"axes {out.axes}",
                do="fuse another stage of the site, or leave this site out",
            )
        every, _ = gate_node(self.gate, self.site, out, edit, self.label, len(weighed), values)
        features = tuple(at for at, letter in enumerate(out.axes) if letter in out.axes.features)
        return [edit.call(weight_of, every, i, features, name="weight") for i in range(len(weighed))]


def _pure(site: Site, out: Value) -> None:
    """An add in place is taken out of the graph with its result: it must not have changed a value that others read."""
    add: Any = site.add if isinstance(site, Residual) else out.node
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
