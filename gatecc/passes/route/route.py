"""Route: replace a feed-forward layer by experts, k of which run for each token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from gatecc.ir.contract import Contract
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.ir.site import Site, Value
from gatecc.passes.gating import read_by, reads_afar
from gatecc.passes.operands import check_positions, gate_shape, own_weight, source, stage
from gatecc.passes.route.experts import Experts
from gatecc.passes.route.ffn import FFN, read_ffn, relative
from gatecc.passes.route.upcycle import ExpertsSpec


@dataclass(frozen=True)
class Route(Rewrite):
    """Replace the feed-forward layer of an MLP site by ``experts``, of which ``router`` chooses k for each token.

    The experts are filled from the layer's own weights, which then leave the layer (`revert` puts them back). Where the
    router's weights sum to 1 and the experts start equal, the model starts as it was. Dropout between the products is
    left out. New modules on the owner: ``router``, and ``label`` with the stacked weights.
    """

    name = "route"

    router: RouterSpec
    experts: ExpertsSpec
    label: str = "experts"

    def contract(self) -> Contract:
        return self.experts.contract(self.router.choice)

    def effects(self) -> Effects:
        return Effects(same_for_layers=True, whole_model=reads_afar(self.router.gate))

    def reads(self) -> Iterable[str]:
        return ("in", "out", *read_by(self.router.gate))

    def rewrite(self, site: Site, edit: Editor) -> None:
        ffn = read_ffn(site, edit.program)
        value, out = stage(site, "in"), stage(site, "out")
        weights, indices = router_nodes(self.router, self.experts.count, self.site, value, edit)
        like = own_weight(site, edit.program)
        layer_weights = relative(ffn, edit.program)

        def build() -> nn.Module:
            return self.experts.build(ffn, None if like is None else like.device, None if like is None else like.dtype)

        def fill(new: Any, layer: nn.Module) -> None:
            self.experts.fill(cast("Experts", new), ffn.stacked(layer_weights(layer)))

        path = edit.module(self.label, build, fill)
        y = edit.call(path, value.node, weights, indices, name=self.label)
        dtype = out.node.meta["val"].dtype
        if y.meta["val"].dtype != dtype:
            y = edit.call(torch.ops.aten.to.dtype, y, dtype)
        edit.replace(out.node, y)
        edit.discard(out.node, inside=True)
        for name in dropped(ffn, edit):
            edit.drop(name)


def router_nodes(
    spec: RouterSpec, experts: int, selector: Selector, value: Value, edit: Editor, label: str = "router"
) -> tuple[fx.Node, fx.Node]:
    """Insert a router for ``value``: its weights and indices, a row for each position of the value."""
    sources = [source(ref, selector.in_, edit) for ref in spec.sources]
    over_tokens = [part.tokens for part in spec.source.parts for _ in part.refs]
    check_positions(value, [s for s, tokens in zip(sources, over_tokens, strict=True) if tokens], edit.site)
    shape = gate_shape(spec.gate, value, sources, edit)
    like = own_weight(edit.site, edit.program)

    def build() -> nn.Module:
        device, dtype = (None, None) if like is None else (like.device, like.dtype)
        return spec.build(shape, experts, device=device, dtype=dtype)

    path = edit.module(label, build, spec.init.fill_from)
    weights, indices = edit.call(path, value.node, *(s.node for s in sources), shape, name=label)
    return weights, indices


def dropped(ffn: FFN, edit: Editor) -> list[str]:
    """What leaves the layer with its dense weights: whole modules where they hold nothing else."""
    names, found = set(ffn.tensors()), dict[str, None]()
    for name in ffn.tensors():
        holder = name.rpartition(".")[0]
        inside = edit.program.inside(holder) and edit.program.relative_name(holder)
        module = edit.program.module.get_submodule(inside) if inside else None
        held = {f"{holder}.{n}" for n, _ in module.named_parameters()} if module is not None else set[str]()
        found[holder if held and held <= names else name] = None
    return list(found)
