"""again: a part of the graph a second time, on other values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from gatecc.errors import GraphError
from gatecc.ir.edit import Editor
from gatecc.ir.ops import mutates
from gatecc.ir.printer import node_text
from gatecc.ir.program import META, origin
from gatecc.passes.operands import place


def again(edit: Editor, values: Mapping[fx.Node, fx.Node], target: fx.Node) -> fx.Node:
    """``target`` computed once more, see `all_again`."""
    return all_again(edit, values, (target,))[0]


def all_again(edit: Editor, values: Mapping[fx.Node, fx.Node], targets: Sequence[fx.Node]) -> list[fx.Node]:
    """``targets`` computed once more, with other nodes in the place of some: a copy of what lies between them.

    A value may stand for itself: what is computed from it is copied, and reads on what it is now when an edit replaces
    it for its other readers; so is the value, if it is computed from another one. Random operators draw again. Raises
    GraphError where something on the way is changed in place.
    """
    copied = {old: new for old, new in values.items() if old is not new}
    for node in between(edit.program.graph, values, targets):
        if mutates(node):
            raise GraphError(
                f"the rewrite {edit.rewrite} computes a part of the model twice, and it changes a value in place",
                where=place(edit.site),
                found=node_text(node),
                do="write x = x + y in the model",
            )
        after = max([node, *(copied.get(n, n) for n in node.all_input_nodes)])
        with edit.program.graph.inserting_after(after):
            copy = edit.program.graph.node_copy(node, lambda n: copied.get(n, n))
        copy.meta = dict(node.meta)
        if "val" in node.meta:  # a tensor of its own: a trace takes two arguments that are one tensor for one
            copy.meta["val"] = tree_map_only(torch.Tensor, torch.Tensor.detach, node.meta["val"])
        copy.meta[META] = replace(origin(node), inserted_by=edit.rewrite)
        edit.inserted.add(copy)
        copied[node] = copy
    return [copied.get(target, target) for target in targets]


def between(graph: fx.Graph, values: Mapping[fx.Node, fx.Node], targets: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes that depend on values and that the targets depend on, in order."""
    later: set[fx.Node] = set()
    for node in graph.nodes:
        if any(n in later or n in values for n in node.all_input_nodes):
            later.add(node)
    needed, stack = set(targets), list(targets)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                stack.append(node)
    return [node for node in graph.nodes if node in later and node in needed and values.get(node, node) is node]
