"""regions: products of matrices with what is made of their results, on a GPU as one generated kernel.

Inductor runs a product and, after it, a kernel for what comes behind. Only by request
(``options={"gatecc.lowerings": ["regions", ...]}``): no GPU has confirmed that the generated kernels win.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace as changed
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from gatecc.ir.ops import mutates, opname
from gatecc.ir.program import META, Program, fake, origin
from gatecc.ir.site import Site
from gatecc.ops.generated import POINTWISE, generated
from gatecc.passes.lower.fused_anyway import fused_anyway
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.replace import replace

UNCONFIRMED = (
    "Inductor fuses it; options={'gatecc.lowerings': ['regions', ...]} makes a kernel of it and the product before it, "
    "which is estimated to move less, and no GPU has confirmed that it is faster"
)
FUSED = "on a CPU it is Inductor's to fuse, in one loop as any kernel would"
_PRODUCTS = ("linear", "matmul", "mm", "addmm")
_MOST = 24  # nodes of a region


class Regions(Lowering):
    """linear(s) and pointwise operators behind them -> one operator with a kernel of its own."""

    name = "regions"
    left = "unless it is asked for by name, on a GPU: norms, gated units, rotary embeddings are fused by Inductor"
    after = ("causal-mask", "experts", "linear-attention", "packed-linears", "spelled-attention")

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        if settings.only is None or self.name not in settings.only:
            yield from self._left(program)
            return
        for members in list(convex_regions(program)):
            yield self._at(program, members)

    def _left(self, program: Program) -> Iterator[Outcome]:
        """What Inductor fuses as well, one outcome a kind."""
        for kind, nodes in fused_anyway(program):
            place = origin(nodes[0])
            found = kind if len(nodes) == 1 else f"{kind}, {len(nodes)} times"
            reason = UNCONFIRMED if _on_gpu(nodes[0]) else FUSED
            yield Outcome(self.name, place.owner, place.line, found, reason=reason)

    def _at(self, program: Program, members: list[fx.Node]) -> Outcome:
        last = members[-1]
        found = f"{sum(_is_product(n) for n in members)} product(s) and {' '.join(map(opname, members))}"
        at = Outcome(self.name, origin(last).owner, origin(last).line, found)
        if not _on_gpu(last):
            return changed(at, reason="on a CPU it is Inductor's to fuse")
        inputs = list(dict.fromkeys(n for m in members for n in m.all_input_nodes if n not in members))
        example = [_example(n) for n in inputs]
        if any(x is None for x in example):
            return changed(at, reason="its columns are of a free size")
        notes = [f"{origin(n).owner} ({origin(n).line}): {opname(n)}" for n in members]
        operator: Any = generated(_function(members, inputs), [x for x in example if x is not None], notes)
        if isinstance(operator, str):
            return changed(at, reason=operator)
        with program.graph.inserting_before(last):
            made = program.graph.call_function(operator, tuple(inputs))
        value = last.meta["val"]
        made.meta = {k: v for k, v in last.meta.items() if k in ("nn_module_stack", "stack_trace")}
        made.meta |= {"val": value.new_empty(value.shape), META: changed(origin(last), inserted_by=self.name)}
        replace(program, last, made)
        inner = [n for n in members if n is not last]
        saved = sum(2 * x.numel() * x.element_size() for n in inner if (x := _example(n)) is not None)
        return changed(at, became=str(operator), gain=f"{saved / 1e6:.1f} MB less to move in a call, an estimate")


def convex_regions(program: Program) -> Iterator[list[fx.Node]]:
    """Products that have pointwise operators behind them, in the order of the graph; no node is in two.

    Nothing outside of a region lies between two of its nodes, and only its last node is read outside.
    """
    whole = nx.DiGraph((source, node) for node in program.calls() for source in node.all_input_nodes)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    taken = set[fx.Node]()
    for node in list(program.calls()):
        if not _is_product(node) or node in taken or fake(node) is None:
            continue
        members = _grown(whole, node, taken)
        while members and not _closed(members, order):
            members = members[:-1]
        if any(not _is_product(n) for n in members):
            taken |= set(members)
            yield sorted(members, key=order.__getitem__)


def _grown(whole: Any, seed: fx.Node, taken: set[fx.Node]) -> list[fx.Node]:
    """The seed and what can be added to it, one node after the other."""
    members = [seed]
    while len(members) < _MOST:
        behind = [u for m in members for u in m.users]
        beside = [s for m in members for s in m.all_input_nodes if all(u in members for u in s.users)]
        fitting = [n for n in (*behind, *beside) if n not in members and n not in taken and _fits(n, seed)]
        added = next((n for n in fitting if _convex(whole, {*members, n})), None)
        if added is None:
            break
        members.append(added)
    return members


def _fits(node: fx.Node, seed: fx.Node) -> bool:
    """Whether a node may be in the region of a product: another product of its shape, or pointwise on its results."""
    value, result = fake(node), fake(seed)
    if node.op != "call_function" or value is None or result is None or mutates(node):
        return False
    if not value.is_floating_point() or str(value.shape) != str(result.shape):
        return False
    if _is_product(node):
        return str(_inner(node)) == str(_inner(seed))
    return opname(node) in POINTWISE


def _convex(whole: Any, members: set[fx.Node]) -> bool:
    below = set[fx.Node]().union(*(nx.descendants(whole, n) for n in members))
    above = set[fx.Node]().union(*(nx.ancestors(whole, n) for n in members))
    return not (below & above) - members


def _closed(members: list[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether only the last node is read outside."""
    last = max(members, key=order.__getitem__)
    return all(u in members for n in members if n is not last for u in n.users) and not _is_product(last)


def _is_product(node: fx.Node) -> bool:
    return opname(node) in _PRODUCTS


def _inner(product: fx.Node) -> Any:
    """How much a product sums over."""
    left: Any = product.args[1 if opname(product) == "addmm" else 0]
    value = fake(left)
    return None if value is None else value.shape[-1]


def _on_gpu(node: fx.Node) -> bool:
    return node.meta["val"].device.type == "cuda"


def _example(node: fx.Node) -> torch.Tensor | None:
    """A tensor like a node's value, with the sizes of the example; None if its last one is free."""
    value = fake(node)
    sizes: list[Any] = [] if value is None else list(value.shape)
    if value is None or (sizes and not isinstance(sizes[-1], int)):
        return None
    sizes = [s if isinstance(s, int) else s.node.hint for s in sizes]
    with _MODE:
        return torch.empty(sizes, dtype=value.dtype)


_MODE = FakeTensorMode()


def _function(members: list[fx.Node], inputs: list[fx.Node]) -> fx.GraphModule:
    """The region as a function of its inputs."""
    graph = fx.Graph()
    copied = {n: graph.placeholder(f"x{i}") for i, n in enumerate(inputs)}
    for node in members:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(copied[members[-1]])
    return fx.GraphModule({}, graph)
