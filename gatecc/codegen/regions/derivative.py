"""derivative: the gradient of a region, as a graph of its inputs and of the gradients of its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from gatecc.codegen.regions.file import print_page
from gatecc.codegen.regions.region import RefusedError, Region, checked, decompositions, dtype


class Gradient(NamedTuple):
    """``graph``: all gradients, of the inputs that have one (``there``). ``part``: those of them that are a region, at
    the places ``by_kernel``; None if there are none. ``rest``: the others; None if there are none."""

    graph: fx.Graph
    there: tuple[bool, ...]
    part: Region | None
    by_kernel: tuple[int, ...]
    rest: fx.Graph | None


def gradient_of(region: Region) -> Gradient:
    """Differentiate a region. Sums over rows (the gradients of weights) are no region, and stay in ATen."""
    graph, there = _traced(region)
    results = list(range(sum(there)))
    notes = ("the gradient of a region; the file of the region names this one",)
    by_kernel = tuple(i for i in results if _region(graph, (i,), notes) is not None)
    part = _region(graph, by_kernel, notes) if by_kernel else None
    if part is None:
        return Gradient(graph, there, None, (), graph)
    left = tuple(i for i in results if i not in by_kernel)
    return Gradient(graph, there, part, by_kernel, _only(graph, left) if left else None)


def _region(graph: fx.Graph, results: tuple[int, ...], notes: Sequence[str]) -> Region | None:
    try:
        region = checked(_only(graph, results), tuple(notes))
        print_page(region)
    except RefusedError:
        return None
    return region


def _only(graph: fx.Graph, results: tuple[int, ...]) -> fx.Graph:
    """The graph with some of its results."""
    copy = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            copy.output(tuple(copied[node.args[0][i]] for i in results))
        else:
            copied[node] = copy.node_copy(node, copied.__getitem__)
            if node.op == "placeholder":
                copied[node].name = node.name
    copy.eliminate_dead_code()
    return copy


def _traced(region: Region) -> tuple[fx.Graph, tuple[bool, ...]]:
    """All gradients, and which inputs have one."""
    inputs = region.inputs
    there = tuple(dtype(n).is_floating_point for n in inputs)
    forward = fx.GraphModule({}, region.graph)
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
    return graph, there
