"""Evaluator: compute one node of a program at sizes of one's choice, without running the model.

Only the node's ancestors run. Sizes come from the symbolic shapes, so that nothing is walked through for its size alone.
Products of data (the content of the model) are replaced with zeros, and an evaluation in which something other than
finite arithmetic is done to them is refused: the result then holds for any content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch._ops import OpOverload

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import CONTRACTIONS, DROPOUTS, FINITE, SHAPE_ONLY, argument, opname
from gatecc.ir.sizes import Sizes, UnknownSizeError, value


class UnprovableError(Exception):
    """The node depends on something that is not known before the model runs."""


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of a program that one node needs, in order. ``inputs``: placeholders whose values matter. ``content``:
    products of data that are taken as zero.
    """

    target: fx.Node
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    content: frozenset[fx.Node]


class Evaluator:
    """Evaluates nodes of one program."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.program = flow.program

    def slice(
        self, target: fx.Node, zero: frozenset[fx.Node] = frozenset(), given: frozenset[fx.Node] = frozenset()
    ) -> Slice:
        """What ``target`` needs. The nodes in ``zero`` count as content; those in ``given`` will be given.

        Raises UnprovableError if a decision is taken on content, if a random operator runs, or if a size depends on data.
        """
        content: set[fx.Node] = set()
        needed: set[fx.Node] = set()
        stack = [target]
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            needed.add(node)
            stack.extend(
                w
                for w in self.flow.writers.get(self.flow.base[node], ())
                if self.flow.order[w] < self.flow.order[target]
            )
            if node in given:
                continue
            if node in zero or (opname(node) in CONTRACTIONS and node in self.flow.data):
                content.add(node)
                stack.extend(_addend(node))
            elif not _is_size(node):
                stack.extend(_needed_inputs(node))
        nodes = sorted(needed, key=self.flow.order.__getitem__)
        self._check(nodes, content, given)
        return Slice(target, nodes, [n for n in nodes if n.op == "placeholder"], frozenset(content))

    def _check(self, nodes: list[fx.Node], content: set[fx.Node], given: frozenset[fx.Node]) -> None:
        tainted = set(content)
        for node in nodes:
            if node in given or node in content:
                continue
            if node.op in ("call_module", "call_method") or (node.op == "call_function" and _is_random(node)):
                raise UnprovableError(f"it is computed by {node.target}")
            touched = (
                [n for n in node.all_input_nodes if n in tainted]
                if not _is_size(node) and opname(node) not in SHAPE_ONLY
                else []
            )
            if touched and not _keeps_finite(node, tainted):
                raise UnprovableError(f"it depends on activations: {node.name} reads {touched[0].name}")
            if touched:
                tainted.add(node)

    def run(
        self,
        part: Slice,
        sizes: Sizes,
        given: Mapping[fx.Node, torch.Tensor] | None = None,
        constants: Mapping[int, int] | None = None,
    ) -> torch.Tensor:
        """The value of ``part.target``. ``given`` holds the placeholders; ``constants`` replaces integers in the graph.

        Raises UnprovableError if the sizes do not fit the graph.
        """
        env: dict[fx.Node, Any] = dict(given or {})
        try:
            with torch.no_grad():
                for node in part.nodes:
                    if node not in env:
                        env[node] = self._node(node, env, sizes, part, constants or {})
        except UnknownSizeError as e:
            raise UnprovableError(str(e)) from e
        except (RuntimeError, IndexError, ValueError, TypeError, KeyError) as e:
            raise UnprovableError(f"it cannot be evaluated at sizes {sorted(map(str, sizes.values()))}: {e}") from e
        return env[part.target]

    def _node(
        self, node: fx.Node, env: dict[fx.Node, Any], sizes: Sizes, part: Slice, constants: Mapping[int, int]
    ) -> Any:
        if node in part.content:
            return self._zeros(node, env, sizes)
        if _is_size(node):
            return value(node.meta["val"], sizes)
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op != "call_function":
            raise UnprovableError(f"it depends on {node.name}")
        if opname(node) in SHAPE_ONLY and isinstance(node.args[0], fx.Node) and node.args[0] not in env:
            env = {**env, node.args[0]: _blank(node.args[0], sizes)}

        def read(item: Any) -> Any:
            if isinstance(item, fx.Node):
                return env[item] if item in env else value(item.meta["val"], sizes)
            return constants.get(item, item) if type(item) is int else item

        args = map_aggregate(node.args, read)
        kwargs = map_aggregate(node.kwargs, read)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _attribute(self, node: fx.Node) -> Any:
        name = str(node.target)
        tensor = self.program.constants.get(name)
        tensor = self.program.parameter(node) if tensor is None else tensor
        if tensor is None:
            return getattr(self.program.graph_module, name)
        return tensor.detach().clone() if node in self.flow.writers else tensor.detach()

    def _zeros(self, node: fx.Node, env: dict[fx.Node, Any], sizes: Sizes) -> torch.Tensor:
        zeros = _blank(node, sizes).zero_()
        for addend in _addend(node):
            zeros = zeros + env[addend] * node.kwargs.get("beta", 1)
        return zeros


def _blank(node: fx.Node, sizes: Sizes) -> torch.Tensor:
    held = node.meta["val"]
    return torch.empty([value(s, sizes) for s in held.shape], dtype=held.dtype, device=held.device)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float)


def _addend(node: fx.Node) -> list[fx.Node]:
    first = node.args[0] if opname(node) in ("baddbmm", "addmm") else None
    return [first] if isinstance(first, fx.Node) else []


def _needed_inputs(node: fx.Node) -> list[fx.Node]:
    inputs = [n for n in node.all_input_nodes if not _is_size(n)]
    if opname(node) in SHAPE_ONLY:
        return [n for n in inputs if n is not node.args[0]]
    return inputs


def _is_random(node: fx.Node) -> bool:
    if opname(node) in DROPOUTS:
        return bool(argument(node, 2, "train"))
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _keeps_finite(node: fx.Node, tainted: set[fx.Node]) -> bool:
    """Whether the node does finite arithmetic on content and decides nothing by it."""
    name = opname(node)
    if name == "where":
        return argument(node, 0, "condition") not in tainted
    if name == "masked_fill":
        return argument(node, 1, "mask") not in tainted
    if name in ("index", "index_select", "gather", "index_put"):
        return all(n not in tainted for n in node.all_input_nodes[1:]) or name == "index_put"
    if name == "div":
        return argument(node, 1, "other") not in tainted
    return name in FINITE
