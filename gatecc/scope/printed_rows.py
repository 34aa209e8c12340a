"""Bodies that run on the samples that need them, in a graph that is being printed, in the place of their operators."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._C._functorch import is_batchedtensor

from gatecc import ops as ops  # registers gatecc::only_if
from gatecc.ir.program import Program
from gatecc.ir.skipped import Skipped, skipped
from gatecc.ops import paths
from gatecc.ops.some_rows import count_of, on_rows, rows_of
from gatecc.scope.traced import is_traced

_BRANCHES: list[list[str]] = []
Emit = Callable[[fx.Node, fx.Graph, dict[fx.Node, fx.Node]], None]


class PrintedRows:
    """What one program skips. ``emit`` prints a node into a graph; a body is a graph of its own, and so is one that
    lies within another. ``sources`` are the texts of the bodies."""

    def __init__(self, program: Program, emit: Emit) -> None:
        self.all = list(skipped(program))
        self.emit = emit
        self.sources: list[str] = []
        self._of = {one.node: one for one in self.all}
        self._left = {node for one in self.all for node in one.inside}

    def printed(self, node: fx.Node, graph: fx.Graph, copied: dict[fx.Node, fx.Node]) -> bool:
        """Whether a node is printed already: in a body, which is called where its result is read."""
        one = self._of.get(node)
        if one is None or node in self._left:
            return node in self._left
        self._call(one, graph, copied)
        return True

    def _call(self, one: Skipped, graph: fx.Graph, copied: dict[fx.Node, fx.Node]) -> None:
        body = fx.Graph()
        inner = {node: body.placeholder(f"given_{i}") for i, node in enumerate(one.given)}
        left = {node for other in self.all if other.node in one.inside for node in other.inside}
        for node in sorted((one.inside | one.sizes) - left):
            deeper = self._of.get(node)
            if deeper is None:
                self.emit(node, body, inner)
            else:
                self._call(deeper, body, inner)
        condition, value, other = cast("tuple[fx.Node, ...]", one.node.args)
        body.output(inner[value])
        code = body.python_code("self")
        names: dict[str, Any] = dict(code.globals)
        exec(compile(code.src, "<gatecc body>", "exec"), names)
        self.sources.append(f"{code.src}{one.axes}")
        given = (copied[condition], copied[other], *(copied[n] for n in one.given))
        copied[one.node] = graph.call_function(_on_rows(names["forward"], one.axes, len(self.sources)), given)


def _on_rows(body: Callable[..., Tensor], axes: Sequence[int | None], number: int) -> Callable[..., Tensor]:
    """A body as ``call(condition, other, *given)``: its result in the rows where the condition holds, else ``other``.

    With a condition for each token a sample is in if one of its tokens is. Nobody's body is not called. A trace cannot
    decide by data: it holds the body for all samples, and the mask.
    """

    def call(condition: Tensor, other: Tensor, *given: Any) -> Tensor:
        if masked(condition, other) or paths.is_whole():
            y = body(None, *given)
            for labels in _BRANCHES:
                labels.append(f"rows_{number}")
                y = torch.ops.gatecc.only_if(y, other, condition.any(), labels[-1])
            return torch.where(condition, y, other)
        rows = rows_of(condition)
        if paths.is_watched():
            read = [x for x in given if isinstance(x, torch.nn.Parameter)]
            every = condition.size(0)
            paths.note(paths.Taken("block", (count_of(rows, every),), every, read))
        return on_rows(partial(body, None), axes, rows, condition, other, given)

    call.__name__ = call.__qualname__ = f"on_rows_{number}"
    return call


@contextmanager
def bodies_in_branches() -> Generator[list[str]]:
    """Graphs that are traced meanwhile say of each body that it is to be computed only if some sample needs it.

    Yields the labels of those that were traced.
    """
    labels = list[str]()
    _BRANCHES.append(labels)
    try:
        yield labels
    finally:
        _BRANCHES.remove(labels)


def masked(*tensors: Tensor) -> bool:
    """Whether rows cannot be told apart now: under a compiler, an export, another trace, or vmap."""
    if torch.compiler.is_compiling() or is_traced(tensors):
        return True
    return any(map(is_batchedtensor, tensors))
