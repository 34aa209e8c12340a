"""lower: the last pass over a step, from a program of ATen operators to straight Python that runs fast.

Operators become torch's own Python functions and methods; chains of reshapes become one; a single token takes the
shortcuts of `emit.shortcuts`, and of its operators the forms that they have registered for one token. What some
samples do not need becomes a call (`emit.rows`). What nobody reads any more is dropped. The lowered graph takes and
returns what the program does.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload

from gatecc.decoder.emit import functions
from gatecc.decoder.emit.rows import Body, skips
from gatecc.decoder.emit.shortcuts import Grouped, choice, grouped, reshapes
from gatecc.decoder.emit.step import Step
from gatecc.ir.dataflow import Flow
from gatecc.ir.skipped import Skipped
from gatecc.ops import registry
from gatecc.ops.some_rows import rows_of

_RESHAPES = (torch.ops.aten.reshape.default, torch.ops.aten.view.default)


def lower(step: Step) -> fx.GraphModule:
    """The step as a graph module of fast calls, whose weights are attributes without dots."""
    return _Lowering(step).module()


class _Lowering:
    def __init__(self, step: Step) -> None:
        self.step, self.flow = step, Flow(step.program)
        self.grouped, self.flat = grouped(step), reshapes(step)
        self.graph = fx.Graph()
        self.weights: dict[str, Any] = {}
        self._of: dict[fx.Node, Any] = {}
        self._reshaped: dict[fx.Node, fx.Node] = {}  # a reshape that was written, and what it reshapes
        self._skips = skips(step)
        self._left = {node for one in self._skips.values() for node in one.inside}
        self._rows: dict[fx.Node, fx.Node] = {}
        for node in step.program.graph.nodes:
            if node not in self._left:
                self._of[node] = self._written(node)
        _drop_unread(self.graph)

    def module(self) -> fx.GraphModule:
        """The lowered graph with its weights."""
        return fx.GraphModule(self.weights, self.graph)

    def _written(self, node: fx.Node) -> fx.Node:
        return self._skipped(self._skips[node]) if node in self._skips else self._lowered(node)

    def _lowered(self, node: fx.Node) -> fx.Node:
        if node.op == "placeholder":
            return self.graph.placeholder(str(node.target))
        if node.op == "get_attr":
            return self._weight(node)
        if node.op == "output":
            return self.graph.output(self._read(node.args[0]))
        if node in self.grouped:
            return self._attention(node, self.grouped[node])
        sizes = self._sizes(node)
        if sizes is not None and self._is_stable(node):
            return self._reshape(node, sizes)
        chosen = choice(node)
        if chosen is not None and all(n in self._of for n in chosen):
            return self.graph.call_function(choose, tuple(self._of[n] for n in chosen))
        return functions.call(self.graph, self._target(node), self._read(node.args), self._read(node.kwargs))

    def _read(self, x: Any) -> Any:
        return fx.map_arg(x, self._of.__getitem__)

    def _weight(self, node: fx.Node) -> fx.Node:
        made = self.graph.create_node("get_attr", node.name)
        made.target = made.name
        self.weights[made.name] = self.step.plan.tensor(node)
        return made

    def _target(self, node: fx.Node) -> Any:
        """What a node calls, or what its operator has for one token in its place."""
        found = registry.find(node.target) if self.step.single else None
        return (found.step.one_token(node) if found is not None and found.step is not None else None) or node.target

    # --- reshapes ---

    def _sizes(self, node: fx.Node) -> Any:
        """The shape of a node that only reshapes."""
        return self._read(node.args[1]) if node.target in _RESHAPES else self.flat.get(node)

    def _is_stable(self, node: fx.Node) -> bool:
        """Whether nothing is written to the node's memory behind its operand, so that a copy serves as well."""
        since = self.flow.order[node.all_input_nodes[0]]
        return all(self.flow.order[w] < since for w in self.flow.writers.get(self.flow.base[node], ()))

    def _reshape(self, node: fx.Node, sizes: Any) -> fx.Node:
        read: fx.Node = self._of[node.all_input_nodes[0]]
        return self._noted(self._reshaped.get(read, read), sizes)

    def _noted(self, x: fx.Node, sizes: Any) -> fx.Node:
        made = self.graph.call_method("reshape", (x, sizes))
        self._reshaped[made] = x
        return made

    # --- what some samples do not need ---

    def _skipped(self, one: Skipped) -> fx.Node:
        """A call of what only the samples of a condition need, in the place of where(condition, value, other)."""
        condition, value, other = cast("tuple[fx.Node, ...]", one.node.args)
        if condition not in self._rows:
            self._rows[condition] = self.graph.call_function(rows_of, (self._of[condition],))
        around = self.graph, self._of, self._reshaped, self._rows
        self.graph, self._reshaped, self._rows = fx.Graph(), {}, {}
        self._of = {node: self.graph.placeholder(f"given_{i}") for i, node in enumerate(one.given)}
        deeper = {node for other in self._skips.values() if other.node in one.inside for node in other.inside}
        for node in sorted((one.inside | one.sizes) - deeper):
            self._of[node] = self._written(node)
        self.graph.output(self._of[value])
        _drop_unread(self.graph)
        within = {str(node.target): self.weights[str(node.target)] for node in self.graph.find_nodes(op="get_attr")}
        body = Body(self.graph, one.axes, within)
        self.graph, self._of, self._reshaped, self._rows = around
        made = self.graph.create_node("get_attr", f"body_{len(self.weights)}")
        made.target = made.name
        self.weights[made.name] = body
        given = (self._of[node] for node in one.given)
        return self.graph.call_method(
            "run", (made, self._rows[condition], self._of[condition], self._of[other], *given)
        )

    # --- attention ---

    def _attention(self, node: fx.Node, found: Grouped) -> fx.Node:
        q, k, v = (self._of[n] for n in (node.all_input_nodes[0], found.keys, found.values))
        if found.before is not None:
            q = self.graph.call_method("reshape", (q, found.before))
        rest = self._read((node.args[3:], node.kwargs))
        made = functions.call(self.graph, node.target, (q, k, v, *rest[0]), rest[1])
        return made if found.after is None else self._noted(made, found.after)


def choose(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x`` if the number is above 0, else ``y``."""
    return x if number > 0 else y


def _drop_unread(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output") and not _writes(node):
            graph.erase_node(node)


def _writes(node: fx.Node) -> bool:
    """Whether a lowered node changes one of its arguments."""
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable
