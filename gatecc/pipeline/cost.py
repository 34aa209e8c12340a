"""Cost: the floating-point operations and the bytes moved of a graph, read from its recorded shapes.

FLOPs are those of ``torch.utils.flop_counter``: matrix products, convolutions and attention, two per multiply-add,
without counting a causal half. Operators in the registry have formulas of their own. Bytes are what the operators read
and write if each runs alone: views are free, a gather reads the rows that it picks. Fusing lowers them.
Symbolic sizes count at their hints, that is at the sizes of the example inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from gatecc.ir.program import Program
from gatecc.ir.skipped import skipped
from gatecc.ops import registry

_GATHERS = frozenset({"aten::embedding", "aten::index", "aten::index_select", "aten::gather", "aten::take_along_dim"})


@dataclass(frozen=True)
class Cost:
    """``uncounted`` names the operators whose FLOPs could not be found out; they count as none."""

    flops: int = 0
    bytes: int = 0
    uncounted: frozenset[str] = frozenset()

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.uncounted | other.uncounted)


def cost(graph: Program | fx.GraphModule) -> Cost:
    """The cost of one run of a whole graph, forward only; the nodes carry their fake values in ``meta["val"]``."""
    owner = graph.graph_module if isinstance(graph, Program) else graph
    return _total(node_cost(node, owner) for node in owner.graph.nodes)


def node_cost(node: fx.Node, owner: fx.GraphModule) -> Cost:
    """The cost of one node. A branch costs as much as its dearest side, any other body as much as its graph.

    ``owner`` holds the bodies of higher-order operators (the graph of a Program does not know its module).
    """
    if node.op != "call_function":
        return Cost()
    if isinstance(node.target, HigherOrderOperator):
        return _body_cost(node, owner)
    if not isinstance(node.target, OpOverload):
        return Cost()  # operator.getitem, arithmetic on sizes
    args, kwargs = tree_map(_spec, (node.args, node.kwargs))
    flops = _flops(node.target, _Frozen(args), _Frozen(kwargs))
    uncounted = frozenset({str(node.target)}) if flops is None else frozenset[str]()
    entry = registry.find(node.target)
    own = entry.bytes(*_make(args), **_make(kwargs)) if entry is not None and entry.bytes is not None else None
    return Cost(flops or 0, _bytes(node) if own is None else own, uncounted)


def _total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def _body_cost(node: fx.Node, owner: fx.GraphModule) -> Cost:
    bodies = [getattr(owner, str(a.target), None) for a in node.all_input_nodes if a.op == "get_attr"]
    costs = [cost(body) for body in bodies if isinstance(body, fx.GraphModule)]
    if node.target is torch.ops.higher_order.cond:
        return max(costs, key=lambda c: (c.flops, c.bytes), default=Cost())
    return _total(costs) if costs else Cost(uncounted=frozenset({str(node.target)}))


def by_data(program: Program) -> bool:
    """Whether what runs depends on data: experts with empty slots, or values that samples skip."""
    entries = (registry.find(node.target) for node in program.calls())
    return any(entry is not None and entry.served is not None for entry in entries) or any(skipped(program))


# FLOPs: torch's own counter, on tensors without storage


@dataclass(frozen=True)
class _TensorSpec:
    """What a FLOP formula may ask of a tensor. Layers of one shape share it, so each operator is counted once."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class _Frozen:
    """Arguments of an operator as a dictionary key: equal if they print alike (1, 1.0 and True differ in print)."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.text = repr(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


def _spec(argument: Any) -> Any:
    """A node as the spec of its value, sizes at their hints; other arguments as they are."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    if isinstance(value, torch.Tensor):
        return _TensorSpec(_hints(value.shape), _hints(value.stride()), value.dtype)
    if isinstance(value, (list, tuple)):
        return [_spec(item) for item in value]
    if isinstance(value, torch.device):
        return torch.device("meta")  # where the specs are made
    return _hint(value)


@lru_cache(maxsize=4096)
def _flops(target: OpOverload, args: _Frozen, kwargs: _Frozen) -> int | None:
    """The FLOPs of one call, None if the operator does not run on shapes alone (its result depends on data)."""
    if not any(isinstance(leaf, _TensorSpec) for leaf in tree_leaves((args.value, kwargs.value))):
        return 0  # a tensor made from nothing
    entry = registry.find(target)
    if entry is not None and entry.flops is not None:
        return entry.flops(*_shapes(args.value), **_shapes(kwargs.value))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        try:
            target(*_make(args.value), **_make(kwargs.value))
        except (RuntimeError, NotImplementedError):
            return None
    return counter.get_total_flops()


def _shapes(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.shape if isinstance(leaf, _TensorSpec) else leaf, value)


def _make(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.make() if isinstance(leaf, _TensorSpec) else leaf, value)


# Bytes


def _bytes(node: fx.Node) -> int:
    assert isinstance(node.target, OpOverload)
    return moved(node.target, [source.meta.get("val") for source in node.all_input_nodes], node.meta.get("val"))


def moved(target: OpOverload, read: Sequence[Any], written: Any) -> int:
    """The bytes that an operator without a formula of its own reads and writes."""
    if _is_view(target):
        return 0
    out, sizes = _size(written), [_size(value) for value in read]
    return 2 * out + sum(sizes[1:]) if target._schema.name in _GATHERS else out + sum(sizes)


def _is_view(target: OpOverload) -> bool:
    returns = [r.alias_info for r in target._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returns)


def _size(value: Any) -> int:
    """Bytes of the distinct elements of a value: an expanded axis is read once."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return sum(_elements(tensor) * tensor.element_size() for tensor in tensors)


def _elements(tensor: torch.Tensor) -> int:
    count = 1
    for size, stride in zip(_hints(tensor.shape), _hints(tensor.stride()), strict=True):
        count *= size if stride else min(size, 1)
    return count


def _hints(sizes: Iterable[int | torch.SymInt]) -> tuple[int, ...]:
    return tuple(_hint(size) for size in sizes)


def _hint(value: Any) -> Any:
    """A symbolic number at its hint. Sizes that depend on data have none and count as 1."""
    if isinstance(value, torch.SymInt):
        return optimization_hint(value, fallback=1)
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value
