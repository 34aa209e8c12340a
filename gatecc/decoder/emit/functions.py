"""The same operators through torch's own Python functions, which are called faster than OpOverloads.

A step of a small model spends most of its time between operators. What has no entry here stays an OpOverload.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_Build = Callable[[fx.Graph, tuple[Any, ...], dict[str, Any]], fx.Node | None]


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """Add a call of ``target`` to a graph, in its fastest form."""
    build = _BUILDERS.get(target)
    made = build(graph, args, kwargs) if build is not None else None
    return made if made is not None else graph.call_function(target, args, kwargs)


def _function(function: Callable[..., Any], count: int | None = None) -> _Build:
    """The first ``count`` arguments, if keyword arguments do not matter."""

    def build(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
        return None if kwargs and count is not None else graph.call_function(function, args[:count], kwargs)

    return build


def _method(name: str, count: int | None = None) -> _Build:
    def build(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
        return None if kwargs else graph.call_method(name, args[:count])

    return build


def _cast(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
    return None if kwargs or True in args[2:] or args[4:] not in ((), (None,)) else graph.call_method("to", args[:2])


def _softmax(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
    return None if kwargs else graph.call_function(torch.softmax, args)


def _power(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    square = args[1] == 2 and not kwargs
    return graph.call_function(operator.mul if square else torch.pow, (args[0], args[0]) if square else args, kwargs)


def _attend(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    return graph.call_function(torch.nn.functional.scaled_dot_product_attention, args, kwargs)


_aten = torch.ops.aten
_nn: Any = getattr(torch._C, "_nn")  # noqa: B009  (type checkers do not know it)
_BUILDERS: dict[Any, _Build] = {
    _aten.linear.default: _function(torch.nn.functional.linear),
    _aten.sym_size.int: _method("size"),
    torch.sym_max: _function(max),
    torch.sym_min: _function(min),
    _aten.add.Tensor: _function(operator.add, 2),
    _aten.sub.Tensor: _function(operator.sub, 2),
    _aten.mul.Tensor: _function(operator.mul, 2),
    _aten.div.Tensor: _function(operator.truediv, 2),
    _aten.neg.default: _function(operator.neg),
    _aten.pow.Tensor_Scalar: _power,
    _aten.rsqrt.default: _function(torch.rsqrt),
    _aten.tanh.default: _function(torch.tanh),
    _aten.sigmoid.default: _function(torch.sigmoid),
    _aten.relu.default: _function(torch.relu),
    _aten.silu.default: _function(_nn.silu),
    _aten.gelu.default: _function(_nn.gelu),
    _aten.mean.dim: _function(torch.mean, 3),
    _aten.cat.default: _function(torch.cat),
    _aten.matmul.default: _function(torch.matmul),
    _aten.bmm.default: _function(torch.bmm),
    _aten.baddbmm.default: _function(torch.baddbmm),
    _aten.layer_norm.default: _function(torch.layer_norm),
    _aten.addmm.default: _function(torch.addmm),
    _aten.softmax.int: _softmax,
    _aten.where.self: _function(torch.where),
    _aten.logaddexp.default: _function(torch.logaddexp),
    _aten.zeros.default: _function(torch.zeros),
    _aten.ones.default: _function(torch.ones),
    _aten.full.default: _function(torch.full),
    _aten.empty.memory_format: _function(torch.empty),
    _aten.arange.start: _function(torch.arange),
    _aten.embedding.default: lambda graph, args, kwargs: graph.call_function(torch.embedding, args[:2]),
    _aten.view.default: _method("view"),
    _aten.reshape.default: _method("reshape"),
    _aten.expand.default: _method("expand", 2),
    _aten.transpose.int: _method("transpose"),
    _aten.permute.default: _method("permute"),
    _aten.unsqueeze.default: _method("unsqueeze"),
    _aten.narrow.default: _method("narrow"),
    _aten.select.int: _method("select"),
    _aten.copy_.default: _method("copy_", 2),
    _aten.clone.default: _method("clone", 1),
    _aten.contiguous.default: _method("contiguous", 1),
    _aten.split.Tensor: _function(torch.split),
    _aten.chunk.default: _function(torch.chunk),
    _aten.to.dtype: _cast,
    _aten.scaled_dot_product_attention.default: _attend,
}
