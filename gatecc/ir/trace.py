"""trace: a call of a Python function or module of tensors as a graph of ATen operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten

from gatecc.errors import GraphError
from gatecc.ir.hooks import silenced
from gatecc.ir.program import fake


def trace(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[fx.Graph, TreeSpec]:
    """The ATen graph of a call on fake tensors, and the structure of its result, whose leaves the graph returns.

    Placeholders: a module's parameters and buffers, then the node arguments. Raises GraphError for results that are no
    tensors.
    """
    specs: list[TreeSpec] = []
    values = [fake(a) for a in arguments if isinstance(a, fx.Node)]
    tensors = _tensors(function) if isinstance(function, nn.Module) else []
    mode = detect_fake_mode([v for v in values if v is not None])
    if mode is None:
        raise GraphError("an edit reads a node that holds no tensor", found=str([str(a) for a in arguments]))

    def flat(*flat_values: torch.Tensor) -> tuple[Any, ...]:
        own = dict(zip((name for name, _ in tensors), flat_values, strict=False))
        rest = iter(flat_values[len(tensors) :])
        actual = [next(rest) if isinstance(a, fx.Node) else a for a in arguments]
        if isinstance(function, nn.Module):
            with silenced(function):
                result = torch.func.functional_call(function, own, tuple(actual))
        else:
            result = function(*actual)
        leaves, spec = tree_flatten(result)
        specs.append(spec)
        return tuple(leaves) if spec.is_leaf() else _apart(leaves, flat_values)

    with mode, _use_lazy_graph_module(True):  # only the graph is wanted, no Python of it
        inputs = [mode.from_tensor(t, static_shapes=True) for _, t in tensors] + _distinct(values)
        traced = make_fx(flat, pre_dispatch=True)(*inputs)
    traced.graph.eliminate_dead_code()
    results: Any = traced.graph.output_node().args[0]
    if other := [value for value in results if not isinstance(value, fx.Node)]:
        raise GraphError(
            "an edit calls what returns something else than tensors",
            where=getattr(function, "__name__", type(function).__name__),
            found=", ".join(type(value).__name__ for value in other),
            expected="a tensor, or a tuple of tensors",
        )
    return traced.graph, specs[-1]


def _distinct(values: Sequence[torch.Tensor | None]) -> list[Any]:
    """Fake tensors of which none is there twice: a copy of a node holds that of the node, and a trace tells values
    apart by their tensors."""
    seen, found = set[int](), list[Any]()
    for value in values:
        again = value is not None and id(value) in seen
        found.append(value.detach().requires_grad_(value.requires_grad) if again and value is not None else value)
        seen.add(id(value))
    return found


def _apart(leaves: Sequence[Any], given: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Several results as values of their own: hooks may change one that is also an argument, or is there twice."""
    seen = {id(value) for value in given}
    apart: list[Any] = []
    for leaf in leaves:
        again = isinstance(leaf, torch.Tensor) and id(leaf) in seen
        apart.append(torch.ops.aten.alias.default(leaf) if again else leaf)
        seen.add(id(leaf))
    return tuple(apart)


def tensor_names(module: nn.Module) -> list[str]:
    """The names of a module's parameters and buffers, in the order of the placeholders of its graph."""
    return [name for name, _ in _tensors(module)]


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
