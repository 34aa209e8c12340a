"""Gating: what the rewrites with a gate share: building it for a value, multiplying, blending."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.gate import GateModule, GateShape, GateSpec
from gatecc.ir.gates.layout import Features, emit
from gatecc.ir.gates.source import Param
from gatecc.ir.program import attribute, fake
from gatecc.ir.select import Selector
from gatecc.ir.site import Site, Value
from gatecc.passes.operands import check_positions, check_tokens, gate_shape, own_weight, place, source
from gatecc.passes.shared_projection import fused_scores, scored_elsewhere


def multiply(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """y <- g * y"""
    return value * gate


def blend(one: torch.Tensor, other: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """y <- g * one + (1 - g) * other"""
    return torch.lerp(other, one, gate)


def multiply_where(
    value: torch.Tensor, gate: torch.Tensor, mask: torch.Tensor, at: str, like: GateShape
) -> torch.Tensor:
    """y <- g * y where the mask over the positions ``at`` holds, y elsewhere."""
    keep = emit(Features(mask.bool().unsqueeze(-1), at), "", like, value)
    return torch.where(keep, value * gate, value)


def read_by(spec: GateSpec) -> list[str]:
    """The values of its own site that a gate reads, other than the gated one."""
    return [ref.stage for ref in spec.sources if ref.stage and ref.stage != "self" and ref.at is None]


def reads_afar(spec: GateSpec) -> bool:
    """Whether a gate reads an input of the model or a value of another site."""
    return any(ref.cond is not None or ref.at is not None for ref in spec.sources)


def gate_node(
    spec: GateSpec,
    selector: Selector,
    value: Value,
    edit: Editor,
    label: str,
    experts: int = 0,
    fused: Sequence[Value] = (),
) -> tuple[fx.Node, GateShape]:
    """Insert a gate for ``value``: the node of the gate, which broadcasts against the value, and its place.

    A gate over so many ``experts`` has them in the place of the value's channels. ``fused``: what ``fused(NUMBER)`` is.
    """
    if not experts:
        _check_number(value, edit.site, selector.stage)
    sources = [source(ref, selector, edit, fused) for ref in spec.sources]
    if spec.fuse_into:
        sources = [fused_scores(spec, value, sources[0], edit)]
        spec = scored_elsewhere(spec)
    if spec.source.tokens:
        check_tokens(value, edit.site)
    over_tokens = [part.tokens for part in spec.source.parts for _ in part.refs]  # the others are pooled: of any length
    check_positions(value, [s for s, tokens in zip(sources, over_tokens, strict=True) if tokens], edit.site)
    at = gate_shape(spec, value, sources, edit, experts)
    like = own_weight(edit.site, edit.program)

    def build() -> nn.Module:
        dtype = None if like is None else like.dtype
        return spec.build(at, device=None if like is None else like.device, dtype=dtype)

    path = edit.module(label, build, spec.init.fill_from)
    module = cast("GateModule", attribute(edit.program.module, path))
    _check_size(module, at, edit.site)
    spelled = () if _same_axes(module.shape, at) else (at,)  # this call spells the site in another way
    return edit.call(path, value.node, *(s.node for s in sources), *spelled, name=label), at


def _check_number(value: Value, site: Site, stage: str) -> None:
    held = fake(value.node)
    if held is not None and not held.dtype.is_floating_point and not held.dtype.is_complex:
        raise SiteRefusedError(
            "the value cannot be gated: it says which, not how much",
            where=place(site),
            found=f"{stage!r} holds numbers of {held.dtype}",
            expected="a value of floating point numbers",
            do="gate another stage of the site; of experts the router or the weights",
        )


def _same_axes(one: GateShape, other: GateShape) -> bool:
    return one.axes == other.axes and [s.axes for s in one.sources] == [s.axes for s in other.sources]


def _check_size(module: GateModule, at: GateShape, site: Site) -> None:
    """Parameters for each token exist for one number of tokens; any number of samples, and any gate that is the same
    function at each place, has them."""
    fixed = set(module.features)
    if isinstance(module.spec.source, Param):
        fixed |= set(module.spec.granularity.positions(module.shape))
    made = {axis: size for axis, size in module.shape.sizes.items() if axis in fixed - set("bg")}
    if any(at.sizes.get(axis, size) != size for axis, size in made.items()):  # unknown: symbolic here
        raise SiteRefusedError(
            "the gate has parameters for another number of tokens",
            where=place(site),
            found=f"sizes {dict(at.sizes)}",
            expected=f"{dict(module.shape.sizes)}",
            do="call the model with sequences of the length that it was transformed with",
        )
