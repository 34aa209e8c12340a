"""regions: the bodies of no-grad and autocast regions become part of the graph, however they are nested.

Outputs of a no-grad region are detached. What autocast casts inside operators is spelled out as casts. Where the call
itself ran under another autocast, the nodes of a region are exempt from it (`Program.exempt`). A region that writes to
tensors from outside without gradients stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled
from torch._ops import OpOverload

from gatecc.ir.ops import mutates, operands, opname, written
from gatecc.ir.program import META, Program, fake
from gatecc.passes.autocast import spell_casts

# What autocast leaves alone: these compute the same with autocast on or off.
_PLAIN = frozenset(
    "to _to_copy add sub mul div neg view reshape _unsafe_view permute transpose unsqueeze squeeze expand contiguous "
    "clone alias detach lift_fresh_copy slice select split chunk unbind getitem cat stack cos sin sigmoid tanh "
    "relu where "
    "masked_fill arange zeros ones full eq ne le lt ge gt _assert_tensor_metadata".split()
)
_Casts = dict[str, torch.dtype | None]  # of each device type: what autocast casts to, None where it is off


def inline_regions(program: Program) -> None:
    """Inline what can be; the graph module is not recompiled."""
    todo: list[tuple[fx.Node, _Casts]] = [(node, {}) for node in program.graph.nodes if _is_region(node)]
    spelled: set[fx.Node] = set()
    while todo:
        node, outer = todo.pop(0)  # in the order of the graph: a later region reads the casts of an earlier one
        found = _entered(program, node, outer)
        if found is None:
            continue
        region, inputs, casts, detach = found
        made = _splice(program, node, region, inputs, detach)
        todo[:0] = [(n, casts) for n in made if _is_region(n)]
        _spell(program, [n for n in made if not _is_region(n)], casts, spelled)


def _is_region(node: fx.Node) -> bool:
    return node.target is wrap_with_set_grad_enabled or node.target is wrap_with_autocast


def _entered(program: Program, node: fx.Node, outer: _Casts) -> tuple[fx.GraphModule, list[Any], _Casts, bool] | None:
    """The body of a region, its inputs, the casts of its operators and whether its outputs are detached; None if it
    stays."""
    if any(user.target is not operator.getitem for user in node.users):
        return None
    if node.target is wrap_with_set_grad_enabled:
        enabled, body, *inputs = node.args
        region = _body(program.graph_module, body)
        return (region, inputs, outer, True) if region and not enabled and _can_detach(region) else None
    device, dtype, enabled, _, body, *inputs = node.args
    region = _body(program.graph_module, body)
    if region is None or any(n.op in ("call_module", "call_method") for n in region.graph.nodes):
        return None
    to = (dtype or torch.get_autocast_dtype(str(device))) if enabled else None
    assert to is None or isinstance(to, torch.dtype)
    return region, list(inputs), outer | {str(device): to}, False


def _spell(program: Program, nodes: list[fx.Node], casts: _Casts, made: set[fx.Node]) -> None:
    """Make nodes compute as under ``casts``, whatever autocast the call is under; ``made`` are the casts so far."""
    calls = [n for n in nodes if n.op == "call_function"]
    around = dict([program.autocast]) if program.autocast else {}
    for device, dtype in casts.items():
        own = [n for n in calls if any(x.device.type == device for x in map(fake, n.all_input_nodes) if x is not None)]
        if dtype == around.get(device) or (dtype is None and all(opname(n) in _PLAIN for n in own)):
            continue
        if dtype is not None:
            spell_casts(program, own, device, dtype, made)
        if device in around:
            program.exempt.update(own, made)


def _body(holder: fx.GraphModule, node: Any) -> fx.GraphModule | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    body = getattr(holder, str(node.target), None)
    return body if isinstance(body, fx.GraphModule) else None


def _can_detach(region: fx.GraphModule) -> bool:
    """Whether the region runs the same with grad on: it writes to nothing from outside, nor do regions inside it."""
    inner: set[fx.Node] = set()
    for node in region.graph.nodes:
        if node.op in ("call_module", "call_method") or not _is_simple(region, node):
            return False
        if any(given not in inner for given in written(node)):
            return False
        sources = node.all_input_nodes
        own = bool(sources) and all(n in inner for n in sources)  # a view of what the region made
        if (node.op == "call_function" and (own or not _may_alias(node))) or mutates(node):
            inner.add(node)
    return True


def _is_simple(region: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node holds a tensor, or the body of a region that can be inlined without gradients too."""
    if node.op != "get_attr" or isinstance(getattr(region, str(node.target), None), torch.Tensor):
        return True
    body = _body(region, node)
    grad = any(user.target is wrap_with_set_grad_enabled and user.args[0] for user in node.users)
    return body is not None and not grad and all(map(_is_region, node.users)) and _can_detach(body)


def _may_alias(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return True
    return any(r.alias_info is not None for r in node.target._schema.returns)


def _splice(program: Program, call: fx.Node, region: fx.GraphModule, inputs: list[Any], detach: bool) -> list[fx.Node]:
    """Copy the region's nodes before ``call`` and let the readers of its outputs read them; returns the copies."""
    graph = program.graph
    values: dict[fx.Node, Any] = {}
    arguments = iter(inputs)
    with graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "get_attr":
                values[node] = _adopt(program, region, node, call)
            elif node.op == "call_function":
                values[node] = graph.node_copy(node, values.__getitem__)
                values[node].meta.setdefault(META, call.meta.get(META))
        outputs = [values[n] if isinstance(n, fx.Node) else n for n in operands(region.graph.output_node())[0]]
        made = [values[n] for n in region.graph.nodes if n.op == "call_function"]
        if detach:
            outputs = [_detached(graph, output) for output in outputs]
    for reader in list(call.users):
        output = outputs[operands(reader)[1]]
        reader.replace_all_uses_with(output)
        graph.erase_node(reader)
    graph.erase_node(call)
    return made


def _adopt(program: Program, region: fx.GraphModule, node: fx.Node, call: fx.Node) -> fx.Node:
    """A constant that lives in the region becomes a constant of the program, a body inside it one of the graph."""
    held = getattr(region, str(node.target))
    kind = "region_constant" if isinstance(held, torch.Tensor) else "region_body"
    numbers = range(len(program.graph.nodes))
    name = next(n for i in numbers if not hasattr(program.graph_module, n := f"{kind}_{i}"))
    if isinstance(held, torch.Tensor):
        program.graph_module.register_buffer(name, held, persistent=False)
        program.constants[name] = held
    else:
        program.graph_module.add_module(name, held)
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
