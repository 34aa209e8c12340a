"""Evaluator: compute one node of a program at sizes of one's choice, without running the model.

Only the node's ancestors run, and sizes come from the symbolic shapes, so that no node runs for its size alone.
Products of what the model made of its data (its content; products of masks are not) are replaced with zeros, and an
evaluation in which something other than finite arithmetic is done to them is refused: the result then holds for any
content.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_aggregate

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
        self._tables: list[torch.Tensor] = []

    def slice(
        self,
        target: fx.Node,
        zero: frozenset[fx.Node] = frozenset(),
        given: frozenset[fx.Node] = frozenset(),
        until: fx.Node | None = None,
    ) -> Slice:
        """What ``target`` needs to be what ``until`` reads (writes in place may come between). The nodes in ``zero``
        count as content; those in ``given`` will be given.

        Raises UnprovableError if a decision is taken on content, if a random operator runs, or if a size depends on
        data.
        """
        end = self.flow.order[until or target]
        content: set[fx.Node] = set()
        needed: set[fx.Node] = set()
        stack = [target]
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            needed.add(node)
            stack.extend(w for w in self.flow.writers.get(self.flow.base[node], ()) if self.flow.order[w] < end)
            if node in given:
                continue
            if node in zero or self._is_content(node):
                content.add(node)
                stack.extend(addends(node))
            elif not _is_size(node):
                stack.extend(_needed_inputs(node))
        nodes = sorted(needed, key=self.flow.order.__getitem__)
        self._check(nodes, content, given)
        return Slice(target, nodes, [n for n in nodes if self.program.is_input(n)], frozenset(content))

    def _is_content(self, node: fx.Node) -> bool:
        """Whether a node is a product of what the model made of its inputs, not of masks alone."""
        learned = node in self.flow.learned or not self.flow.learned  # no parameter is known: any may be an input
        return opname(node) in CONTRACTIONS and node in self.flow.data and learned

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

    def signature(self, part: Slice) -> Hashable:
        """Equal for slices that compute the same: layers build their masks again and again."""
        number: dict[fx.Node, int] = {}
        rows: list[Hashable] = []
        for node in part.nodes:
            number[node] = len(rows)
            held = node.meta.get("val")
            if _is_size(node):
                rows.append(str(held))
            elif node in part.content and isinstance(held, torch.Tensor):
                rows.append(("content", str(held.shape), held.dtype, tuple(number[a] for a in addends(node))))
            elif self.program.path(node) is not None:
                rows.append(self._table(node))
            else:
                rows.append((node.op, node.target, _frozen((node.args, node.kwargs), number)))
        return tuple(rows)

    def _table(self, node: fx.Node) -> Hashable:
        """A number for a parameter or buffer, the same for equal ones."""
        held = self._attribute(node)
        if not isinstance(held, torch.Tensor) or held.is_meta:
            return str(self.program.path(node))
        for i, table in enumerate(self._tables):
            if table.dtype == held.dtype and torch.equal(table, held):
                return "table", i
        self._tables.append(held)
        return "table", len(self._tables) - 1

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
        if self.program.path(node) is not None:
            return self._attribute(node)
        if node.op != "call_function":
            raise UnprovableError(f"it depends on {node.name}")
        if opname(node) in SHAPE_ONLY and isinstance(node.args[0], fx.Node) and node.args[0] not in env:
            env = {**env, node.args[0]: _blank(node.args[0], sizes)}

        def read(item: Any) -> Any:
            if isinstance(item, fx.Node):
                return env[item] if item in env or not _is_size(item) else value(item.meta["val"], sizes)
            if isinstance(item, torch.device):
                return place(item)
            return constants.get(item, item) if type(item) is int else item

        args = map_aggregate(node.args, read)
        kwargs = map_aggregate(node.kwargs, read)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _attribute(self, node: fx.Node) -> Any:
        tensor = self.program.tensor(node)
        if tensor is None:
            return getattr(self.program.graph_module, str(node.target))
        if tensor.is_meta:
            raise UnprovableError(f"it depends on {self.program.path(node)}, which is on the meta device")
        return tensor.detach().clone() if node in self.flow.writers else tensor.detach()

    def _zeros(self, node: fx.Node, env: dict[fx.Node, Any], sizes: Sizes) -> torch.Tensor:
        zeros = _blank(node, sizes).zero_()
        for addend in addends(node):
            zeros = zeros + env[addend] * node.kwargs.get("beta", 1)
        return zeros


def _frozen(value: Any, number: Mapping[fx.Node, int]) -> Hashable:
    """Arguments as something that can be hashed; nodes by number."""
    if isinstance(value, fx.Node):
        return ("node", number[value]) if value in number else ("size", str(value.meta.get("val")))
    if isinstance(value, list | tuple):
        return tuple(_frozen(v, number) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v, number)) for k, v in value.items())
    return value if isinstance(value, Hashable) else repr(value)


def _blank(node: fx.Node, sizes: Sizes) -> torch.Tensor:
    held = node.meta["val"]
    return torch.empty([value(s, sizes) for s in held.shape], dtype=held.dtype, device=place(held.device))


def place(device: torch.device) -> torch.device:
    """Where a program on a device is evaluated: one on the meta device has values on the CPU."""
    return torch.device("cpu") if device.type == "meta" else device


def addends(node: fx.Node) -> list[fx.Node]:
    """What a product of data adds to the product."""
    first = node.args[0] if opname(node) in ("baddbmm", "addmm") else None
    return [first] if isinstance(first, fx.Node) else []


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float)


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
