"""GraphWriter: the graph of a program that is being written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from gatecc.decoder.plan import Plan


class GraphWriter:
    """Writes nodes into ``graph``. ``weights``: the parameters, buffers and constants that it reads, by name."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.graph = fx.Graph()
        self.weights: dict[str, torch.Tensor] = {}
        self._written: dict[Any, fx.Node] = {}

    def once(self, key: Any, write: Callable[[], fx.Node]) -> fx.Node:
        """The node that ``write`` yields, written at the first call with this key."""
        if key not in self._written:
            self._written[key] = write()
        return self._written[key]

    def weight(self, node: fx.Node) -> fx.Node:
        """The parameter, buffer or constant that a node of the captured graph reads."""
        name = str(self.plan.program.path(node)).replace(".", "_")
        self.weights[name] = self.plan.tensor(node)
        return self.once(("weight", name), lambda: self.graph.create_node("get_attr", name))

    def narrow(self, x: Any, axis: int, start: Any, count: Any) -> fx.Node:
        """Part of an axis."""
        return self.graph.call_method("narrow", (x, axis, start, count))

    def module(self) -> fx.GraphModule:
        """The graph as a module whose attributes are the weights."""
        root = torch.nn.Module()
        for name, tensor in self.weights.items():
            root.register_buffer(name, tensor)
        return fx.GraphModule(root, self.graph)
