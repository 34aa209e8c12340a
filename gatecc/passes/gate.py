"""Gate: multiply a value of a site by a gate, or blend it with another value of the site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import fx, nn

from gatecc import ops as ops  # registers the operators that gates call by name, for ir lies below ops
from gatecc.errors import SiteRefusedError
from gatecc.ir.contract import Contract
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gate import GateModule, GateShape, GateSpec
from gatecc.ir.program import attribute
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Site, Value
from gatecc.passes.fold_factor import fold_into_next
from gatecc.passes.operands import (
    check_positions,
    check_tokens,
    condition,
    gate_shape,
    laid_out,
    own_weight,
    place,
    readers,
    source,
    source_shape,
    stage,
)
from gatecc.passes.shared_projection import fused_scores, scored_elsewhere


def multiply(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """y <- g * y"""
    return value * gate


def blend(value: torch.Tensor, gate: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """y <- g * y + (1 - g) * other"""
    return torch.lerp(other, value, gate)


def multiply_where(
    value: torch.Tensor, gate: torch.Tensor, mask: torch.Tensor, at: str, like: GateShape
) -> torch.Tensor:
    """y <- g * y where the mask over the positions ``at`` holds, y elsewhere."""
    return torch.where(laid_out(mask, value, at, like), value * gate, value)


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
            return edit.call(blend, value.node, gate, stage(edit.site, self.skip).node, name=name)
        if not self.where:
            return edit.call(multiply, value.node, gate, name=name)
        mask = condition(self.where, edit.program, value)
        return edit.call(multiply_where, value.node, gate, mask.node, mask.axes.positions.text, at, name=name)


def read_by(spec: GateSpec) -> list[str]:
    """The values of its own site that a gate reads, other than the gated one."""
    return [ref.stage for ref in spec.sources if ref.stage and ref.stage != "self" and ref.at is None]


def reads_afar(spec: GateSpec) -> bool:
    """Whether a gate reads an input of the model or a value of another site."""
    return any(ref.cond is not None or ref.at is not None for ref in spec.sources)


def gate_node(spec: GateSpec, selector: Any, value: Value, edit: Editor, label: str) -> tuple[fx.Node, GateShape]:
    """Insert a gate for ``value``: the node of the gate, which broadcasts against the value, and its place."""
    sources = [source(ref, selector, edit) for ref in spec.sources]
    if spec.fuse_into:
        sources = [fused_scores(spec, value, sources[0], edit)]
        spec = scored_elsewhere(spec)
    if spec.source.tokens:
        check_tokens(value, edit.site)
    over_tokens = [part.tokens for part in spec.source.parts for _ in part.refs]  # the others are pooled: of any length
    check_positions(value, [s for s, tokens in zip(sources, over_tokens, strict=True) if tokens], edit.site)
    at = gate_shape(spec, value, sources, edit)
    like = own_weight(edit.site, edit.program)

    def build() -> nn.Module:
        dtype = None if like is None else like.dtype
        return spec.build(at, device=None if like is None else like.device, dtype=dtype)

    path = edit.module(label, build, spec.init.fill_from)
    module = cast("GateModule", attribute(edit.program.module, path))
    _check_size(module, at, edit.site)
    laid = () if _laid_out_alike(module.shape, at) else (at,)  # this call spells the site in another way
    return edit.call(path, value.node, *(s.node for s in sources), *laid, name=label), at


def _laid_out_alike(one: GateShape, other: GateShape) -> bool:
    return one.axes == other.axes and [s.axes for s in one.sources] == [s.axes for s in other.sources]


def _check_size(module: GateModule, at: GateShape, site: Site) -> None:
    """Parameters for each token exist for one number of tokens; any number of samples has them."""
    made = {axis: size for axis, size in module.shape.sizes.items() if axis not in "bg"}
    if any(at.sizes.get(axis, size) != size for axis, size in made.items()):  # unknown: symbolic here
        raise SiteRefusedError(
            "the gate has parameters for another number of tokens",
            where=place(site),
            found=f"sizes {dict(at.sizes)}",
            expected=f"{dict(module.shape.sizes)}",
            do="call the model with sequences of the length that it was transformed with",
        )


__all__ = ["Gate", "blend", "gate_node", "multiply", "multiply_where", "read_by", "reads_afar", "source_shape"]
