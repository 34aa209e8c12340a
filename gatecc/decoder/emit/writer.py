"""GraphWriter: the graph of a program that is being written, of ATen operators and arithmetic on sizes."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from gatecc.decoder.plan import Plan
from gatecc.ir.program import META, Origin, origin

_aten = torch.ops.aten


class GraphWriter:
    """Writes nodes into ``graph``; each has the origin of the captured node that it is written for.

    ``weights``: the parameters, buffers and constants that the graph reads, by their paths in the captured module.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.graph = fx.Graph()
        self.weights: dict[str, torch.Tensor] = {}
        self._written: dict[Any, fx.Node] = {}
        self._origin = Origin("")

    @contextmanager
    def writing_for(self, node: fx.Node) -> Generator[None]:
        """What is written meanwhile comes from ``node`` of the captured graph."""
        before, self._origin = self._origin, origin(node)
        try:
            yield
        finally:
            self._origin = before

    def call(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        """A call of an operator, named after it."""
        name = target._opname if isinstance(target, OpOverload) else None
        return self._noted(self.graph.create_node("call_function", target, args, kwargs or {}, name=name))

    def once(self, key: Any, write: Callable[[], fx.Node]) -> fx.Node:
        """The node that ``write`` yields, written at the first call with this key."""
        if key not in self._written:
            self._written[key] = write()
        return self._written[key]

    def weight(self, node: fx.Node) -> fx.Node:
        """The parameter, buffer or constant that a node of the captured graph reads."""
        path = str(self.plan.program.path(node))
        self.weights[path] = self.plan.tensor(node)
        made = self.once(("weight", path), lambda: self._noted(self.graph.create_node("get_attr", path)))
        made.meta["val"] = node.meta["val"]
        return made

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A constant of the program's own."""
        self.weights[name] = value
        made = self._noted(self.graph.create_node("get_attr", name))
        made.meta["val"] = value
        return made

    def size(self, x: fx.Node, axis: int) -> fx.Node:
        """The size of an axis."""
        return self.once(("size", x, axis), lambda: self.call(_aten.sym_size.int, (x, axis)))

    def narrow(self, x: Any, axis: int, start: Any, count: Any) -> fx.Node:
        """Part of an axis."""
        return self.call(_aten.narrow.default, (x, axis, start, count))

    def _noted(self, made: fx.Node) -> fx.Node:
        made.meta[META] = self._origin
        return made

    def module(self) -> fx.GraphModule:
        """The graph as a module that holds the weights under their paths."""
        return fx.GraphModule(self.weights, self.graph)
