"""canonicalize: bring a captured program into the one form that matchers and rewrites expect.

After it: every operator call has one spelling (arguments positional with defaults filled in; keyword-only arguments
only where they differ from the default), assertions about sizes and dtypes are gone, regions without gradients and
regions of autocast are part of the graph (see regions.py), a tensor that is filled part by part is read through one
node that holds it complete, and no dead node is left. Outputs and gradients are bitwise the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from gatecc.ir.dataflow import Flow
from gatecc.ir.functions import entries
from gatecc.ir.ops import mutates, opname
from gatecc.ir.program import Program
from gatecc.passes.regions import inline_regions

_ASSERTIONS = frozenset(
    "_assert_scalar _assert_tensor_metadata _assert_async sym_constrain_range sym_constrain_range_for_size".split()
)


def canonicalize(program: Program) -> None:
    """Rewrite ``program`` in place. Linear in the number of nodes; the graph module is not recompiled."""
    inline_regions(program)
    for node in list(program.graph.nodes):
        if _is_idle_assertion(node):
            program.graph.erase_node(node)
        elif node.op == "call_function" and isinstance(node.target, OpOverload):
            _normalise(node, node.target)
    if any(mutates(node) for node in program.calls()):
        _name_complete(program)
    _drop_dead(program.graph, entries(program.functions))
    _drop_unused_bodies(program)


# --- arguments --------------------------------------------------------------------------------------------------------


@cache
def _signature(target: OpOverload) -> tuple[tuple[tuple[str, bool, Any], ...], dict[str, Any]]:
    """The positional arguments as (name, has a default, default), and the defaults of the keyword-only ones."""
    arguments = target._schema.arguments
    positional = tuple((a.name, a.has_default_value(), a.default_value) for a in arguments if not a.kwarg_only)
    return positional, {a.name: a.default_value for a in arguments if a.kwarg_only and a.has_default_value()}


def _normalise(node: fx.Node, target: OpOverload) -> None:
    positional, keyword_defaults = _signature(target)
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, has_default, default in positional[len(args) :]:
        if name not in kwargs and not has_default:
            return  # an argument that the schema requires is missing: leave the node for the verifier to name
        args.append(kwargs.pop(name, default))
    kwargs = {
        name: v for name, v in kwargs.items() if name not in keyword_defaults or not _equal(v, keyword_defaults[name])
    }
    if len(args) != len(node.args):
        node.args = tuple(args)
    if len(kwargs) != len(node.kwargs):
        node.kwargs = kwargs


def _equal(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and not isinstance(one, fx.Node) and bool(one == other))


# --- assertions -------------------------------------------------------------------------------------------------------


def _is_idle_assertion(node: fx.Node) -> bool:
    """An assertion about sizes or dtypes: the program's guards say the same. Those about data stay."""
    if opname(node) not in _ASSERTIONS or node.users:
        return False
    return (
        not any(_depends_on_data(source) for source in node.all_input_nodes)
        or opname(node) == "_assert_tensor_metadata"
    )


def _depends_on_data(node: fx.Node) -> bool:
    held = node.meta.get("val")
    if isinstance(held, torch.SymInt | torch.SymFloat | torch.SymBool):
        return bool(free_unbacked_symbols(held))
    return isinstance(held, torch.Tensor)


# --- writes -----------------------------------------------------------------------------------------------------------


def _name_complete(program: Program) -> None:
    """Give a tensor that is written to through views an alias after the last write, for its later readers.

    Otherwise the one node stands for what it holds before, between and after the writes, and cannot be replaced.
    """
    flow = Flow(program)
    for base, writers in flow.writers.items():
        last = max(writers, key=flow.order.__getitem__)
        readers = [user for user in base.users if flow.order[user] > flow.order[last]]
        if base.op != "call_function" or not readers:
            continue
        with program.graph.inserting_after(last):
            alias = program.graph.call_function(torch.ops.aten.alias.default, (base,))
        alias.meta = dict(base.meta)
        for reader in readers:
            reader.replace_input_with(base, alias)


def _drop_dead(graph: fx.Graph, kept: set[fx.Node]) -> None:
    """Erase nodes that nobody reads. Writes and random operators stay: the latter move the generator on."""
    for node in reversed(graph.nodes):
        if not node.users and not node.is_impure() and node not in kept:
            graph.erase_node(node)


def _drop_unused_bodies(program: Program) -> None:
    """Remove the graph modules of regions that were inlined."""
    used = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    for name, child in list(program.graph_module.named_children()):
        if isinstance(child, fx.GraphModule) and name not in used:
            delattr(program.graph_module, name)
