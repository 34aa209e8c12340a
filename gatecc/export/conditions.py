"""Conditions: the branches of torch.cond, put into the graph around them, where lowerings see what is inside.

Each value that comes out is ``gatecc::only_if``, which is an ``If`` again once the graph is written, with what it alone
needs inside: the rewritten form of attention, norms and products, as outside of branches.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gatecc.ir.ops import mutates
from gatecc.ir.outcome import Outcome
from gatecc.ir.program import META, Program, origin

NAME = "condition"
_COND: Any = torch.ops.higher_order.cond
_ONLY_IF: Any = torch.ops.gatecc.only_if.default


def open_conditions(program: Program) -> list[Outcome]:
    """Put the branches of every torch.cond into a graph, in place, those of nested ones too.

    One is left as it is, with the reason, if its condition is no tensor, or if a branch writes to a tensor or returns
    something that is none.
    """
    outcomes: list[Outcome] = []
    left: set[fx.Node] = set()
    while nodes := [n for n in program.graph.find_nodes(op="call_function", target=_COND) if n not in left]:
        for node in nodes:
            reason = _unfit(program, node)
            if reason:
                left.add(node)
            else:
                _open(program, node, f"condition_{len(outcomes)}")
            at = origin(node)
            outcomes.append(Outcome(NAME, at.owner, at.line, "torch.cond", "" if reason else "If", reason))
    return outcomes


def _branches(program: Program, node: fx.Node) -> list[fx.GraphModule]:
    bodies = (program.graph_module.get_submodule(str(x.target)) for x in node.args[1:3] if isinstance(x, fx.Node))
    return [cast("fx.GraphModule", body) for body in bodies]


def _results(branch: fx.GraphModule) -> list[Any]:
    return pytree.tree_leaves(branch.graph.output_node().args[0])


def _unfit(program: Program, node: fx.Node) -> str:
    condition = node.args[0]
    if not isinstance(condition, fx.Node) or not isinstance(condition.meta.get("val"), Tensor):
        return "its condition is no tensor"
    if any(user.target is not operator.getitem for user in node.users):
        return "its results are read in another way than one by one"
    for branch in _branches(program, node):
        if any(mutates(n) for n in branch.graph.nodes):
            return "a branch writes to a tensor"
        for value in _results(branch):
            if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
                return "a branch returns something that is no tensor"
    return ""


def _open(program: Program, node: fx.Node, label: str) -> None:
    then, other = (_inlined(program, node, branch) for branch in _branches(program, node))
    read: dict[int, list[fx.Node]] = {}
    for user in node.users:
        assert user.target is operator.getitem
        read.setdefault(int(str(user.args[1])), []).append(user)
    for number, users in read.items():
        with program.graph.inserting_before(node):
            made = program.graph.call_function(_ONLY_IF, (then[number], other[number], node.args[0], label))
        made.meta = dict(users[0].meta)
        for user in users:
            user.replace_all_uses_with(made)
            program.graph.erase_node(user)
    bodies = [x for x in node.args[1:3] if isinstance(x, fx.Node)]
    program.graph.erase_node(node)
    for body in bodies:
        if not body.users:
            program.graph.erase_node(body)


def _inlined(program: Program, node: fx.Node, branch: fx.GraphModule) -> Sequence[fx.Node]:
    """What a branch returns, computed in front of the node."""
    operands = iter(pytree.tree_leaves(node.args[3], is_leaf=lambda x: isinstance(x, fx.Node)))
    known: dict[fx.Node, Any] = {}
    with program.graph.inserting_before(node):
        for inner in branch.graph.nodes:
            if inner.op == "placeholder":
                known[inner] = next(operands)
            elif inner.op == "get_attr":
                known[inner] = _held(program, branch, inner)
            elif inner.op != "output":
                known[inner] = made = program.graph.node_copy(inner, known.__getitem__)
                if META not in made.meta:
                    made.meta[META] = origin(node)
    return [known[value] for value in _results(branch)]


def _held(program: Program, branch: fx.GraphModule, inner: fx.Node) -> fx.Node:
    """A constant or a body that a branch holds, in the graph around it under a name of its own."""
    value: Any = branch
    for step in str(inner.target).split("."):
        value = getattr(value, step)
    number = 0
    while hasattr(program.graph_module, name := f"_condition_{number}"):
        number += 1
    if isinstance(value, Tensor):
        program.constants[name] = value
        program.graph_module.register_buffer(name, value, persistent=False)
    else:
        setattr(program.graph_module, name, value)
    made = program.graph.get_attr(name)
    made.meta = dict(inner.meta)
    return made


__all__ = ["NAME", "open_conditions"]
