"""Router nodes: a router among experts, inserted into a graph."""

from __future__ import annotations

from typing import Any, cast

from torch import fx, nn

from gatecc.ir.edit import Editor
from gatecc.ir.program import attribute
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.ir.site import Value
from gatecc.passes.operands import check_positions, condition, gate_shape, own_weight, source
from gatecc.passes.route.experts import Experts
from gatecc.passes.route.similar import Similar, fill_similar


def router_nodes(
    spec: RouterSpec,
    count: int,
    selector: Selector,
    value: Value,
    edit: Editor,
    label: str = "router",
    experts: str = "",
) -> tuple[fx.Node, fx.Node]:
    """Insert a router among ``count`` experts for ``value``: its weights and indices, a row for each position of it.

    ``experts``: the path of the module of experts that the router may start from.
    """
    sources = [source(ref, selector.in_, edit) for ref in spec.sources]
    over_tokens = [part.tokens for part in spec.source.parts for _ in part.refs]
    check_positions(value, [s for s, tokens in zip(sources, over_tokens, strict=True) if tokens], edit.site)
    shape = gate_shape(spec.gate, value, sources, edit)
    like = own_weight(edit.site, edit.program)

    def build() -> nn.Module:
        device, dtype = (None, None) if like is None else (like.device, like.dtype)
        return spec.build(shape, count, device=device, dtype=dtype)

    def fill(new: Any, layer: nn.Module) -> None:
        spec.init.fill_from(new, layer)
        if isinstance(spec.init, Similar):
            fill_similar(spec.init, new, cast("Experts", attribute(layer, experts)))

    path = edit.module(label, build, fill)
    masks = [condition(spec.mask, edit.program, value).node] if spec.mask else []
    weights, indices = edit.call(path, value.node, *(s.node for s in sources), *masks, shape, name=label)
    return weights, indices
