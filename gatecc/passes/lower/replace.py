"""replace: readers of a value read another one, and what only the old value needed goes."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import mutates, opname, writes_for_others, written
from gatecc.ir.program import Program

_ASSERTIONS = frozenset("_assert_scalar _assert_async sym_constrain_range sym_constrain_range_for_size".split())


def replace(program: Program, old: fx.Node, new: fx.Node) -> None:
    """Let the readers of ``old`` read ``new``, and erase ``old`` with what only it needed: writes into tensors of its
    own too, which the elimination of dead code leaves alone, and assertions about sizes that nobody uses any more."""
    old.replace_all_uses_with(new)
    _erase(program.graph, [old])
    _erase_unread(program)
    for node in [n for n in program.calls() if _has_free_size(n)]:
        sinks = [n for n in _after(node) if not n.users]
        if sinks and all(opname(n) in _ASSERTIONS for n in sinks):
            for sink in sinks:
                sources = sink.all_input_nodes
                program.graph.erase_node(sink)
                _erase(program.graph, sources)


def _erase(graph: fx.Graph, stack: list[fx.Node]) -> None:
    while stack:
        dead = stack.pop()
        if dead.op != "call_function" or dead._erased or dead.users or writes_for_others(dead):
            continue
        stack.extend(dead.all_input_nodes)
        graph.erase_node(dead)


def _erase_unread(program: Program) -> None:
    """Erase what nothing depends on, with writes into tensors that operators made: of these, only reads count, and
    only those by which something else comes about than more of such writes."""
    flow = Flow(program)
    todo = [program.graph.output_node(), *(n for n in program.calls() if _acts(n, flow))]
    needed: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += [*node.all_input_nodes, *flow.writers.get(flow.base[node], ())]
    for node in reversed(list(program.calls())):
        if node not in needed:
            program.graph.erase_node(node)


def _acts(node: fx.Node, flow: Flow) -> bool:
    """Whether a call does more than to yield a value, seen from outside of the graph."""
    if not mutates(node) or opname(node) == "detach":
        return node.is_impure()
    bases = [flow.base[given] for given in written(node)] or [node]
    made = (b.op == "call_function" and isinstance(b.target, OpOverload) and not mutates(b) for b in bases)
    return not all(made)


def _has_free_size(node: fx.Node) -> bool:
    """Whether an operator yields as many elements as its data says."""
    if opname(node) == "where":
        return len(node.args) == 1
    return isinstance(node.target, OpOverload) and torch.Tag.dynamic_output_shape in node.target.tags


def _after(node: fx.Node) -> set[fx.Node]:
    """The nodes that depend on a node."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        new = [n for n in todo.pop().users if n not in seen]
        seen.update(new)
        todo += new
    return seen
