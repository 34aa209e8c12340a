"""derivative: the gradient of a region, as a graph of its inputs and of the gradients of its results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from gatecc.codegen.regions.region import Region, decompositions, dtype


def gradient_of(region: Region) -> tuple[Region, tuple[bool, ...]]:
    """All gradients, no single region any more, and which inputs have one."""
    inputs = region.inputs
    there = tuple(dtype(n).is_floating_point for n in inputs)
    forward = fx.GraphModule({}, region.source or region.graph)
    values = [n.meta["val"] for n in inputs]
    grads = [n.meta["val"] for n in region.outputs]

    def backward(*given: Tensor) -> tuple[Any, ...]:
        tensors, of_results = given[: len(inputs)], given[len(inputs) :]

        def learned(*some: Tensor) -> Any:
            left = iter(some)
            return forward(*(next(left) if t else x for x, t in zip(tensors, there, strict=True)))

        pulled: Any = torch.func.vjp(learned, *(x for x, t in zip(tensors, there, strict=True) if t))
        return tuple(pulled[1](tuple(of_results)))

    mode = values[0].fake_mode
    with mode:
        fresh = [torch.empty_like(v) for v in (*values, *grads)]
    graph = make_fx(
        torch.func.functionalize(backward, remove="mutations"),
        decomposition_table=decompositions(),
        tracing_mode="fake",
    )(*fresh).graph
    graph.eliminate_dead_code()
    names = [*(n.name for n in inputs), *(f"grad{i}" for i in range(len(grads)))]
    for node, name in zip([n for n in graph.nodes if n.op == "placeholder"], names, strict=True):
        node.name = node.target = name
    notes = ("the gradient of a region; the file of the region names this one",)
    return Region(graph, region.rows, (), notes), there
