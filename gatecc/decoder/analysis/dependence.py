"""Dependence: what a node of the graph depends on decides when the decoder computes it.

size      on the sizes of the inputs alone: a number
position  on no input's values: masks, rotary tables, learned positions. Evaluated once for a whole capacity
context   on inputs that stay the same while a text is decoded, or on their sizes: an encoder. Evaluated once per text
live      on the length, and on a context or on values per token (an attention mask): evaluated in each step
data      on the tokens: evaluated for the new tokens
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import fx

from gatecc.decoder.analysis.axes import Lengths
from gatecc.decoder.analysis.inputs import Inputs
from gatecc.decoder.rules.slots import MARKS
from gatecc.ir.dataflow import Flow, value_inputs
from gatecc.ir.sizes import node_shape, symbols

DependsOn = Literal["size", "position", "context", "live", "data"]


class Dependence:
    """What every node of a graph depends on."""

    def __init__(self, flow: Flow, inputs: Inputs) -> None:
        self.flow, self.lengths = flow, inputs.lengths
        nodes = [n for n in flow.program.graph.nodes if n.op != "output"]
        sizes = {n for n in nodes if is_size(n, self.lengths)}
        data = self._reached({inputs.tokens, *inputs.carried}, nodes, sizes)
        measured = {n for n in nodes if n not in sizes and self._measures(n)}
        given = self._reached({*inputs.history, *inputs.context, *measured}, nodes, sizes) - data
        live = self._reached(set(inputs.history), nodes, sizes) | {n for n in given if self._grows(n)}
        live = self._reached(live, nodes, sizes)
        self._of: dict[fx.Node, DependsOn] = {}
        for node in nodes:
            if node in sizes:
                self._of[node] = "size"
            elif node in data:
                self._of[node] = "data"
            elif node in given:
                self._of[node] = "live" if node in live else "context"
            else:
                self._of[node] = "position"
        self._demote(nodes)
        self._of |= {node: "data" for node in nodes if node.target in MARKS}

    def of(self, node: fx.Node) -> DependsOn:
        """What a node depends on; marks stand for data."""
        return self._of.get(node, "position")

    @property
    def positions(self) -> frozenset[fx.Node]:
        """The nodes that depend on no input's values."""
        return frozenset(node for node, on in self._of.items() if on == "position")

    def _measures(self, node: fx.Node) -> bool:
        """Whether a node reads the length of a context as a number, or has an axis of such a length."""
        sizes = [n.meta.get("val") for n in node.all_input_nodes if is_size(n, self.lengths)]
        return any(self.lengths.foreign(size) for size in (*sizes, *(node_shape(node) or ())))

    def _grows(self, node: fx.Node) -> bool:
        """Whether a node has an axis along the tokens, or reads something that has."""
        if any(is_size(n, self.lengths) and self.lengths.has(n.meta["val"]) for n in node.all_input_nodes):
            return True
        return any(self.lengths.axes(n) for n in (node, *node.all_input_nodes))

    def _reached(self, start: set[fx.Node], nodes: Iterable[fx.Node], sizes: set[fx.Node]) -> set[fx.Node]:
        """``start`` and every node whose value depends on it, also through writes in place."""
        reached, before = set(start), -1
        while len(reached) != before:
            before = len(reached)
            for node in nodes:
                if node in reached or node in sizes:
                    continue
                writers = self.flow.writers.get(self.flow.base.get(node, node), ())
                if any(n in reached for n in (*value_inputs(node), *writers)):
                    reached.add(node)
        return reached

    def _demote(self, nodes: list[fx.Node]) -> None:
        """Turn nodes that have a flattened token axis and meet data into data: they are computed for the new tokens."""
        for node in reversed(nodes):
            if self._of[node] not in ("position", "live") or not self.lengths.is_flat(node):
                continue
            if any(self._of.get(user) == "data" for user in node.users):
                self._of[node] = "data"


def is_size(node: fx.Node, lengths: Lengths) -> bool:
    """Whether a node holds a number that follows from the sizes of the inputs."""
    held = node.meta.get("val")
    if isinstance(held, torch.SymInt | torch.SymFloat | torch.SymBool):
        return symbols(held) <= lengths.length | lengths.batch | lengths.other
    return isinstance(held, int | float | bool) and node.op == "call_function"
