"""trace: a call of a Python function or module of tensors as a graph of ATen operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx

from gatecc.errors import GraphError
from gatecc.ir.hooks import silenced
from gatecc.ir.program import fake


def trace(function: Callable[..., torch.Tensor], arguments: Sequence[Any]) -> fx.Graph:
    """The ATen graph of a call on fake tensors. Placeholders: a module's parameters and buffers, then the node
    arguments."""
    values = [fake(a) for a in arguments if isinstance(a, fx.Node)]
    tensors = _tensors(function) if isinstance(function, nn.Module) else []
    mode = detect_fake_mode([v for v in values if v is not None])
    if mode is None:
        raise GraphError("an edit reads a node that holds no tensor", found=str([str(a) for a in arguments]))

    def flat(*flat_values: torch.Tensor) -> torch.Tensor:
        own = dict(zip((name for name, _ in tensors), flat_values, strict=False))
        rest = iter(flat_values[len(tensors) :])
        actual = [next(rest) if isinstance(a, fx.Node) else a for a in arguments]
        if isinstance(function, nn.Module):
            with silenced(function):
                return cast("torch.Tensor", torch.func.functional_call(function, own, tuple(actual)))
        return function(*actual)

    with mode, _use_lazy_graph_module(True):  # only the graph is wanted, no Python of it
        inputs = [mode.from_tensor(t, static_shapes=True) for _, t in tensors] + values
        traced = make_fx(flat, pre_dispatch=True)(*inputs)
    traced.graph.eliminate_dead_code()
    return traced.graph


def tensor_names(module: nn.Module) -> list[str]:
    """The names of a module's parameters and buffers, in the order of the placeholders of its graph."""
    return [name for name, _ in _tensors(module)]


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
