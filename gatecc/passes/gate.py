"""Gate: multiply a value of a site by a gate, or blend it with another value of the site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn

from gatecc.errors import GraphError
from gatecc.ir.contract import Contract
from gatecc.ir.edit import Editor
from gatecc.ir.gate import GateShape, GateSpec, Ref, SourceShape
from gatecc.ir.gates.init import Reuse
from gatecc.ir.gates.layout import FEATURES, positions
from gatecc.ir.program import Program, attribute, origin, shape
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Attention, Site, Value
from gatecc.passes.fold import fold_into_next


def multiply(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """y <- g * y"""
    return value * gate


def blend(value: torch.Tensor, gate: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """y <- g * y + (1 - g) * other"""
    return torch.lerp(other, value, gate)


@dataclass(frozen=True)
class Gate(Rewrite):
    """Multiply a value of a site by a gate: ``y <- g * y``; with op="lerp", ``y <- g * y + (1 - g) * skip``.

    ``site`` selects the value (``Attention[...].heads``, ``MLP[...].out``, ``Residual[...].branch``); ``gate`` says what
    the gate reads, how it is scored, what it varies over, and how it starts. ``skip`` names the other value of a lerp.
    ``label`` names the new module on the owner. The T-tests that hold: identity at init (T1), gradients (T5), export
    (T6), removal (T8).
    """

    name = "gate"

    gate: GateSpec
    op: Literal["mul", "lerp"] = "mul"
    skip: str = "skip"
    label: str = "gate"

    def contract(self) -> Contract:
        return self.gate.contract()

    def footprint(self, site: Site) -> Iterable[fx.Node]:
        stages = [self.site.stage, *(r.stage for r in self.gate.sources if r.stage and r.stage != "self")]
        stages += [self.skip] if self.op == "lerp" else []
        yield from (site.values[stage].node for stage in stages if stage in site.values)
        for ref in self.gate.sources:
            if ref.cond is not None:
                yield from (n for n in _value(site).node.graph.nodes if n.op == "placeholder" and n.name == ref.cond)

    def rewrite(self, site: Site, edit: Editor) -> None:
        value = self._stage(site, self.site.stage)
        sources = [self._source(ref, value, site, edit) for ref in self.gate.sources]
        place = GateShape(value.axes, sizes(value, site), tuple(_source_shape(s) for s in sources))
        like = next(edit.program.module.parameters(), None)

        def build() -> nn.Module:
            dtype = None if like is None else like.dtype
            module = self.gate.build(place, device=None if like is None else like.device, dtype=dtype)
            if isinstance(self.gate.init, Reuse):
                module.reuse(attribute(edit.program.module, self.gate.init.name))
            return module

        path = edit.module(self.label, build)
        gate = edit.call(path, value.node, *(s.node for s in sources), name=self.label)
        extra = [self._stage(site, self.skip).node] if self.op == "lerp" else []
        gated = edit.call(blend if extra else multiply, value.node, gate, *extra, name=f"{self.label}d")
        edit.replace(value.node, gated)
        if self.gate.fold_factor != 1:
            fold_into_next(edit, gated, self.gate.fold_factor)

    def _stage(self, site: Site, stage: str) -> Value:
        value = site.values.get(stage)
        if value is None:
            raise GraphError(
                f"the site has no value {stage!r}",
                where=f"{site.owner} {site.line}".strip(),
                found=f"this {site.kind} is spelled so that it has {', '.join(site.values)}",
                do="select another stage, or sites that have it with a predicate",
            )
        return value

    def _source(self, ref: Ref, value: Value, site: Site, edit: Editor) -> Value:
        if ref.cond is not None:
            return _condition(ref.cond, edit.program, value)
        return value if ref.stage == "self" else self._stage(site, str(ref.stage))


def _value(site: Site) -> Value:
    return next(iter(site.values.values()))


def _condition(name: str, program: Program, value: Value) -> Value:
    """An input of the model by its parameter name; one number per sample, or one per token."""
    for node, path in zip(program.placeholders, program.paths, strict=True):
        if path == (name,) or node.name == name:
            rank = len(shape(node))
            return Value(node, ("b" + positions(value.axes).replace("b", "") + "c")[:rank] if rank != 2 else "bc")
    known = ", ".join(n.name for n in program.placeholders)
    raise GraphError(f"the model has no input {name!r}", found=f"inputs {known}", do="name the forward's parameter")


def _source_shape(value: Value) -> SourceShape:
    sizes_ = shape(value.node)
    channels = 1
    for axis, size in zip(value.axes, sizes_, strict=True):
        channels *= int(size) if axis in FEATURES else 1
    return SourceShape(value.axes, channels)


def sizes(value: Value, site: Site) -> dict[str, int]:
    """The static sizes that a gate at this value can know."""
    known = {a: int(s) for a, s in zip(value.axes, shape(value.node), strict=True) if isinstance(s, int)}
    if isinstance(site, Attention) and site.heads:
        known.setdefault("h", site.heads)
    return known


def owner_of(node: fx.Node) -> str:
    """The module that computes a node."""
    return origin(node).owner
