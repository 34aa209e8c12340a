"""Kinds: what a node of the graph depends on decides when the decoder computes it.

size      a number made of the sizes of the inputs
position  not on any input's values: masks, rotary tables, learned positions. Evaluated once for a whole capacity
context   on inputs that stay while a text is decoded, or on their sizes: an encoder. Evaluated once for a text
live      on these or on values per token (an attention mask), and on the length: evaluated in each step
data      on the tokens: evaluated for the new tokens
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import fx

from gatecc.decoder.analysis.axes import Lengths
from gatecc.decoder.analysis.inputs import Inputs
from gatecc.ir.dataflow import Flow, value_inputs
from gatecc.ir.sizes import node_shape, symbols

Kind = Literal["size", "position", "context", "live", "data"]


class Kinds:
    """``of[node]`` is the kind of every node that computes something."""

    def __init__(self, flow: Flow, inputs: Inputs) -> None:
        self.flow, self.lengths = flow, inputs.lengths
        nodes = [n for n in flow.program.graph.nodes if n.op != "output"]
        sizes = {n for n in nodes if is_size(n, self.lengths)}
        data = self._reached({inputs.tokens}, nodes, sizes)
        measured = {n for n in nodes if n not in sizes and self._measures(n)}
        given = self._reached({*inputs.history, *inputs.context, *measured}, nodes, sizes) - data
        live = self._reached(set(inputs.history), nodes, sizes) | {n for n in given if self._grows(n)}
        live = self._reached(live, nodes, sizes)
        self.of: dict[fx.Node, Kind] = {}
        for node in nodes:
            if node in sizes:
                self.of[node] = "size"
            elif node in data:
                self.of[node] = "data"
            elif node in given:
                self.of[node] = "live" if node in live else "context"
            else:
                self.of[node] = "position"
        self._demote(nodes)

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
        """What has a flattened token axis and meets data becomes data: it is computed for the new tokens."""
        for node in reversed(nodes):
            if self.of[node] not in ("position", "live") or not self.lengths.is_flat(node):
                continue
            if any(self.of.get(user) == "data" for user in node.users):
                self.of[node] = "data"


def is_size(node: fx.Node, lengths: Lengths) -> bool:
    """Whether a node holds a number that the sizes of the inputs decide."""
    held = node.meta.get("val")
    if isinstance(held, torch.SymInt | torch.SymFloat | torch.SymBool):
        return symbols(held) <= lengths.length | lengths.batch | lengths.other
    return isinstance(held, int | float | bool) and node.op == "call_function"
