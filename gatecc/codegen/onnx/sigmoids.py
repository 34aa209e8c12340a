"""Sigmoids: those whose relative precision counts, in a form that has it.

ONNX Runtime's sigmoid is right to 1e-7 and 0 below -18. As a gate that is enough; not where a logarithm, a root, a
power, a division or a product with an exponential reads it, perhaps through other pointwise operators:
``log(sigmoid(x))`` would be -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

aten: Any = torch.ops.aten
_SIGMOID = (aten.sigmoid.default, aten.special_expit.default)
_LOGS = (aten.log.default, aten.log2.default, aten.log10.default, aten.log1p.default, aten.special_log1p.default)
_SENSITIVE = {
    *_LOGS,
    *(aten.logit.default, aten.special_logit.default, aten.xlogy.Tensor, aten.special_entr.default),
    *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.acosh.default, aten.atanh.default),
}
_POWERS = (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor)
_QUOTIENTS = (aten.div.Tensor, aten.div.Tensor_mode, aten.true_divide.Tensor, aten.divide.Tensor)
_GROWING = {aten.exp.default, aten.exp2.default, aten.reciprocal.default, *_POWERS}  # what a product may be large by
_VIEWS = {
    *(aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.transpose.int),
    *(aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.flatten.using_ints),
    *(aten.unflatten.int, aten.clone.default, aten.contiguous.default, aten.to.dtype, aten.cat.default),
    *(aten.stack.default, aten.movedim.int, aten._to_copy.default, aten.chunk.default, aten.split.Tensor),
    *(aten.cumsum.default, aten.sum.dim_IntList, aten.prod.dim_int, aten.cumprod.default),
}


def exact_sigmoids(program: ExportedProgram) -> None:
    """Put the exact form in the place of every sigmoid that needs it, and log_softmax in that of log(softmax)."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule) and _rewritten(module.graph):
            module.recompile()


def _rewritten(graph: fx.Graph) -> bool:
    before = len(graph.nodes)
    for node in list(graph.nodes):
        if node.target is aten.log.default:
            _join_log(graph, node)
    for node in list(graph.nodes):
        if node.target in _SIGMOID and node.users and _counts(node):
            _spell_out(graph, node)
    return len(graph.nodes) != before


def _join_log(graph: fx.Graph, log: fx.Node) -> None:
    """log(sigmoid(x)) and log(softmax(x)) have operators of their own, which do not underflow."""
    inner = log.args[0]
    if not isinstance(inner, fx.Node):
        return
    if inner.target in _SIGMOID:
        target, args = aten.log_sigmoid.default, inner.args
    elif inner.target is aten.softmax.int:
        target, args = aten.log_softmax.int, inner.args
    else:
        return
    with graph.inserting_before(log):
        joined = graph.call_function(target, args, dict(inner.kwargs))
    joined.meta = dict(log.meta)
    log.replace_all_uses_with(joined)
    graph.erase_node(log)
    if not inner.users:
        graph.erase_node(inner)


def _counts(node: fx.Node) -> bool:
    """Whether an operator that magnifies what is lost reads this value."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        value = waiting.pop()
        for user in value.users:
            if user in seen:
                continue
            seen.add(user)
            if _magnifies(user, value):
                return True
            if user.target in _VIEWS or user.target is torch.ops.aten.where.self or _pointwise(user):
                waiting.append(user)
    return False


def _magnifies(user: fx.Node, value: fx.Node) -> bool:
    if user.target in _SENSITIVE:
        return True
    if user.target in _POWERS:
        exponent = user.args[1]
        return not (isinstance(exponent, int | float) and exponent > 0 and float(exponent).is_integer())
    if user.target in _QUOTIENTS:  # by a tensor, which may be as small
        return isinstance(user.args[1], fx.Node)
    others = [n for n in user.all_input_nodes if n is not value] if user.target is aten.mul.Tensor else []
    return any(n.target in _GROWING for n in others)


def _pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _spell_out(graph: fx.Graph, node: fx.Node) -> None:
    """exp(min(x, 0)) / (1 + exp(-|x|)), in float32 for half precision, and of -x where only 1 - sigmoid(x) is read."""
    flipped = [user for user in node.users if _complement(user, node)]
    for user in flipped:
        if _counts(user):
            _replace(graph, user, node, minus=True)
    if node.users:
        _replace(graph, node, node, minus=False)


def _complement(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` is 1 - node."""
    if user.target is aten.rsub.Scalar:
        return len(user.args) == 2 and user.args[0] is node and _one(user.args[1])
    return user.target is aten.sub.Tensor and _one(user.args[0]) and user.args[1] is node and not user.kwargs


def _one(x: Any) -> bool:
    return isinstance(x, int | float) and x == 1


def _replace(graph: fx.Graph, old: fx.Node, sigmoid: fx.Node, *, minus: bool) -> None:
    value: torch.Tensor = old.meta["val"]
    wide = value.to(torch.float32) if value.dtype in (torch.float16, torch.bfloat16) else value

    def call(target: Callable[..., Any], *args: Any, meta: torch.Tensor = wide) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = {**old.meta, "val": meta}
        return node

    with graph.inserting_before(old):
        x: Any = sigmoid.args[0]
        if wide.dtype != x.meta["val"].dtype:
            x = call(aten.to.dtype, x, wide.dtype)
        x = call(aten.neg.default, x) if minus else x
        top = call(aten.exp.default, call(aten.clamp_max.default, x, 0))
        below = call(aten.exp.default, call(aten.neg.default, call(aten.abs.default, x)))
        exact = call(aten.div.Tensor, top, call(aten.add.Scalar, below, 1))
        if wide.dtype != value.dtype:
            exact = call(aten.to.dtype, exact, value.dtype, meta=value)
    old.replace_all_uses_with(exact)
    graph.erase_node(old)
    if old is not sigmoid and not sigmoid.users:
        graph.erase_node(sigmoid)
