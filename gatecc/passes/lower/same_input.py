"""same_input: linears that read one value, and the one product that they become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import VIEWS, mutates, opname
from gatecc.ir.program import Program, fake
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.restride import restride


@dataclass(frozen=True)
class Group:
    """Linears that read one value, in the order of the graph, and their numbers of outputs."""

    linears: list[fx.Node]
    widths: list[int]

    def of(self, places: Sequence[int]) -> Group:
        """Some of them."""
        return Group([self.linears[i] for i in places], [self.widths[i] for i in places])


def groups(program: Program) -> Iterator[Group]:
    found: dict[tuple[object, ...], list[fx.Node]] = {}
    written = 0  # a value that something was written into meanwhile is another one
    for node in program.calls():
        written += mutates(node)
        if opname(node) != "linear" or not isinstance(node.args[0], fx.Node):
            continue
        weights = [a for a in node.args[1:] if a is not None]
        x, first = fake(node.args[0]), fake(weights[0]) if isinstance(weights[0], fx.Node) else None
        if x is None or first is None or not all(isinstance(w, fx.Node) and program.is_parameter(w) for w in weights):
            continue
        if not any(isinstance(size, torch.SymInt) for size in first.shape):
            found.setdefault((node.args[0], len(weights), first.dtype, written), []).append(node)
    for linears in found.values():
        if len(linears) > 1 and len({node.all_input_nodes[1] for node in linears}) == len(linears):
            yield Group(linears, [int(_weight(node).shape[0]) for node in linears])


def _weight(linear: fx.Node) -> torch.Tensor:
    return linear.all_input_nodes[1].meta["val"]


def pack(
    program: Program, lowering: str, group: Group, product: Callable[..., Tensor], views: Flow | None = None
) -> None:
    """Put ``product(x, weights, biases)`` in the place of linears. Its parts are copied, so that they lie as before;
    with ``views``, the flow of the program, only where somebody writes to them, returns them, or views them as they
    lay."""
    x, *operands = group.linears[0].all_input_nodes
    biased, count = len(operands) > 1, len(group.linears)
    weights = [node.all_input_nodes[1] for node in group.linears]
    biases = [node.all_input_nodes[2] for node in group.linears] if biased else []

    def packed(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        bias = torch.cat(given[count:]) if biased else None
        parts = product(x, torch.cat(given[:count]), bias).split(group.widths, -1)
        return tuple(map(_copied, parts) if views is None else parts)

    first = group.linears[0]
    for held in (*weights, *biases):
        if held.op == "get_attr":
            first.prepend(held)
    for node, part in zip(group.linears, insert(program, lowering, first, packed, x, *weights, *biases), strict=True):
        owned = views is not None and (bool(views.writes_to(node)) or _returned(node))
        node.replace_all_uses_with(part)
        if views is not None and (owned or not restride(program, part)):
            readers = list(part.users)
            (copy,) = insert(program, lowering, node, _copied, part)
            for reader in readers:
                reader.replace_input_with(part, copy)
        program.graph.erase_node(node)


def _copied(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


def _returned(node: fx.Node) -> bool:
    return any(user.op == "output" or (opname(user) in VIEWS and _returned(user)) for user in node.users)


__all__ = ["Group", "groups", "pack"]
