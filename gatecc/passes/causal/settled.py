"""Values of which every token is made of that token of what enters alone, told from the graph without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from gatecc.ir.dataflow import Flow, value_inputs
from gatecc.ir.ops import mutates, opname
from gatecc.ir.program import fake
from gatecc.passes.causal.axes import Axes, listed, rank


class Settled:
    """What the operators say of some nodes, in order. ``sources``: what enters, with the axis of its tokens.

    ``axes``: nodes that have tokens for certain, with their axis. ``touched``: nodes that depend on the sources.
    """

    def __init__(self, flow: Flow, nodes: Sequence[fx.Node], sources: Mapping[fx.Node, int]) -> None:
        self._flow = flow
        self.axes = dict(sources)
        self.touched = set(sources)
        axes = Axes()
        for node in nodes:
            if node in sources:
                continue
            kept = axes.visit(node)
            given = [*value_inputs(node), *flow.writers.get(flow.base[node], ())]
            if not self.touched.intersection(given):
                continue
            self.touched |= {node, flow.base[node]}
            writes = mutates(node) and opname(node) != "detach"
            held = fake(node)
            plain = held is not None and held.is_floating_point() and not writes
            if plain and not flow.writers.get(flow.base[node]):
                self._settle(node, axes, kept)

    def _settle(self, node: fx.Node, axes: Axes, kept: set[tuple[fx.Node, int]]) -> None:
        inputs = [n for n in map(listed, value_inputs(node)) if n in self.touched]
        if any(n not in self.axes or (n, self.axes[n]) in kept for n in inputs):
            return
        tokens = {axes.root((n, self.axes[n])) for n in inputs}
        found = [at for at in range(rank(node)) if axes.root((node, at)) in tokens]
        if len(tokens) == 1 and len(found) == 1 and (node, found[0]) not in kept:
            self.axes[node] = found[0]

    def needed(self, unsettled: Sequence[fx.Node]) -> list[fx.Node]:
        """What must be run to see what some nodes hold, in order: up to what is settled, and writers to storages."""
        flow, todo = self._flow, list(unsettled)
        seen: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node in seen or node in self.axes:
                continue
            seen.add(node)
            if not isinstance(node.meta.get("val"), int | torch.SymInt):
                todo += [*value_inputs(node), *flow.writers.get(flow.base[node], ())]
        return sorted(seen, key=flow.order.__getitem__)
