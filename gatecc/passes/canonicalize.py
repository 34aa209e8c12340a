"""canonicalize: bring a captured program into the one form that matchers and rewrites expect.

After it: every operator call has one spelling (arguments positional with defaults filled in; keyword-only arguments
only where they differ from the default), assertions about sizes and dtypes are gone, no-grad regions are part of the
graph with their outputs detached, a tensor that is filled part by part is read through one node that holds it complete,
and no dead node is left. Outputs and gradients are bitwise the same.
"""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import mutates, operands, opname
from gatecc.ir.program import META, Program

# What autocast leaves alone: a region of these computes the same with autocast on or off.
_PLAIN = frozenset(
    "to _to_copy add sub mul div neg view reshape _unsafe_view permute transpose unsqueeze squeeze expand contiguous "
    "clone alias detach lift_fresh_copy slice select split chunk unbind getitem cat stack cos sin sigmoid tanh "
    "relu where "
    "masked_fill arange zeros ones full eq ne le lt ge gt".split()
)
_ASSERTIONS = frozenset(
    "_assert_scalar _assert_tensor_metadata _assert_async sym_constrain_range sym_constrain_range_for_size".split()
)


def canonicalize(program: Program) -> None:
    """Rewrite ``program`` in place. Linear in the number of nodes; the graph module is not recompiled."""
    for node in list(program.graph.nodes):
        _inline_region(program, node)
    for node in list(program.graph.nodes):
        if _is_idle_assertion(node):
            program.graph.erase_node(node)
        elif node.op == "call_function" and isinstance(node.target, OpOverload):
            _normalise(node, node.target)
    if any(mutates(node) for node in program.calls()):
        _name_complete(program)
    _drop_dead(program.graph)
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


# --- regions ----------------------------------------------------------------------------------------------------------


def _inline_region(program: Program, node: fx.Node) -> None:
    """Inline a no-grad region (outputs detached), or an autocast region on which autocast has no effect."""
    if node.target is wrap_with_set_grad_enabled:
        enabled, body, *inputs = node.args
        detach = True
    elif node.target is wrap_with_autocast:
        *_, enabled, _, body = node.args[:5]
        inputs, detach = list(node.args[5:]), False
    else:
        return
    region = _body(program, body)
    if region is None or any(n.target is not operator.getitem for n in node.users):
        return
    if not (_can_detach(region) if detach and not enabled else not detach and _is_plain(region)):
        return
    _splice(program, node, region, inputs, detach)


def _body(program: Program, node: Any) -> fx.GraphModule | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    body = getattr(program.graph_module, str(node.target), None)
    return body if isinstance(body, fx.GraphModule) else None


def _can_detach(region: fx.GraphModule) -> bool:
    """Whether the region runs the same with grad on: it writes to nothing from outside and holds no other region."""
    inner: set[fx.Node] = set()
    for node in region.graph.nodes:
        if node.op in ("call_module", "call_method") or (node.op == "get_attr" and not _is_tensor(region, node)):
            return False
        if mutates(node) and node.args[0] not in inner:
            return False
        sources = node.all_input_nodes
        own = bool(sources) and all(n in inner for n in sources)  # a view of what the region made
        if (node.op == "call_function" and (own or not _may_alias(node))) or mutates(node):
            inner.add(node)
    return True


def _may_alias(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return True
    return any(r.alias_info is not None for r in node.target._schema.returns)


def _is_plain(region: fx.GraphModule) -> bool:
    calls = [n for n in region.graph.nodes if n.op == "call_function"]
    return _can_detach(region) and all(opname(n) in _PLAIN or opname(n) in _ASSERTIONS for n in calls)


def _is_tensor(region: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(getattr(region, str(node.target), None), torch.Tensor)


def _splice(program: Program, call: fx.Node, region: fx.GraphModule, inputs: list[Any], detach: bool) -> None:
    """Copy the region's nodes before ``call`` and let the readers of its outputs read them."""
    graph = program.graph
    values: dict[fx.Node, Any] = {}
    arguments = iter(inputs)
    with graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "get_attr":
                values[node] = _adopt_constant(program, region, node, call)
            elif node.op == "call_function":
                values[node] = graph.node_copy(node, values.__getitem__)
                values[node].meta.setdefault(META, call.meta.get(META))
        outputs = [values[n] if isinstance(n, fx.Node) else n for n in operands(region.graph.output_node())[0]]
        if detach:
            outputs = [_detached(graph, output) for output in outputs]
    for reader in list(call.users):
        output = outputs[operands(reader)[1]]
        reader.replace_all_uses_with(output)
        graph.erase_node(reader)
    graph.erase_node(call)


def _adopt_constant(program: Program, region: fx.GraphModule, node: fx.Node, call: fx.Node) -> fx.Node:
    """A constant that lives in the region becomes a constant of the program."""
    name = next(
        n for i in range(len(program.constants) + 1) if not hasattr(program.graph_module, n := f"region_constant_{i}")
    )
    tensor = getattr(region, str(node.target))
    program.graph_module.register_buffer(name, tensor, persistent=False)
    program.constants[name] = tensor
    copy = program.graph.get_attr(name)
    copy.meta = {**node.meta, META: call.meta.get(META)}
    return copy


def _detached(graph: fx.Graph, node: Any) -> Any:
    """``node.detach()``; integers carry no gradient and stay as they are."""
    held = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(held, torch.Tensor) or not (held.is_floating_point() or held.is_complex()):
        return node
    result = graph.call_function(torch.ops.aten.detach.default, (node,))
    result.meta = {**node.meta, "val": held.detach() if held.requires_grad else held}
    return result


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


def _drop_dead(graph: fx.Graph) -> None:
    """Erase nodes that nobody reads. Writes and random operators stay: the latter move the generator on."""
    for node in reversed(graph.nodes):
        if not node.users and not node.is_impure():
            graph.erase_node(node)


def _drop_unused_bodies(program: Program) -> None:
    """Remove the graph modules of regions that were inlined."""
    used = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    for name, child in list(program.graph_module.named_children()):
        if isinstance(child, fx.GraphModule) and name not in used:
            delattr(program.graph_module, name)
