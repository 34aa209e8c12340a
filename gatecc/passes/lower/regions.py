"""regions: products of matrices with what is before and behind them, on a GPU as one generated kernel.

Before a product: a norm, a gate; behind it: pointwise operators, a norm of few columns; beside it: products of its
shape, those of low rank among them. Inductor runs a product and, before and after it, kernels for the rest. A static
model says where one kernel takes longer than two. Only by request (``options={"gatecc.lowerings": ["regions", ...]}``):
no GPU has confirmed that the generated kernels win.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace as changed
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from gatecc.ir.ops import opname
from gatecc.ir.program import META, Program, fake, origin
from gatecc.ir.site import Site
from gatecc.ops.generated import generated
from gatecc.passes.lower.attention.autocast import autocasts
from gatecc.passes.lower.fused_anyway import fused_anyway
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.region_growth import Regions as Growth
from gatecc.passes.lower.region_growth import is_product
from gatecc.passes.lower.replace import replace

UNCONFIRMED = (
    "Inductor fuses it; options={'gatecc.lowerings': ['regions', ...]} makes a kernel of it and the product before it, "
    "which is estimated to move less, and no GPU has confirmed that it is faster"
)
FUSED = "on a CPU it is Inductor's to fuse, in one loop as any kernel would"


class Regions(Lowering):
    """linear(s), what only they read and what is made of them -> one operator with a kernel of its own."""

    name = "regions"
    left = (
        "unless it is asked for by name, on a GPU; a norm or a gate of low rank that a static model finds faster alone"
    )
    after = ("adapters", "causal-mask", "experts", "linear-attention", "packed-linears", "spelled-attention")

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        if settings.only is None or self.name not in settings.only:
            yield from self._left(program)
            return
        growth, cast = Growth(program), autocasts(program)
        for members, operator, reason in [chosen for seed in growth.products for chosen in _chosen(growth, seed, cast)]:
            yield self._at(program, members, operator, reason)

    def _left(self, program: Program) -> Iterator[Outcome]:
        """What Inductor fuses as well, one outcome a kind."""
        for kind, nodes in fused_anyway(program):
            place = origin(nodes[0])
            found = kind if len(nodes) == 1 else f"{kind}, {len(nodes)} times"
            reason = UNCONFIRMED if _on_gpu(nodes[0]) else FUSED
            yield Outcome(self.name, place.owner, place.line, found, reason=reason)

    def _at(self, program: Program, members: list[fx.Node], operator: OpOverload | None, reason: str) -> Outcome:
        last = members[-1]
        found = f"{sum(map(is_product, members))} product(s) and {' '.join(map(opname, members))}"
        at = Outcome(self.name, origin(last).owner, origin(last).line, found, reason=reason)
        if operator is None:
            return at
        inner = [n for n in members if n is not last]
        saved = sum(2 * x.numel() * x.element_size() for n in inner if (x := _example(n)) is not None)
        with program.graph.inserting_before(last):
            made = program.graph.call_function(operator, tuple(_inputs(members)))
        value = last.meta["val"]
        made.meta = {k: v for k, v in last.meta.items() if k in ("nn_module_stack", "stack_trace")}
        made.meta |= {"val": value.new_empty(value.shape), META: changed(origin(last), inserted_by=self.name)}
        replace(program, last, made)
        return changed(at, became=str(operator), gain=f"{saved / 1e6:.1f} MB less to move in a call, an estimate")


def _chosen(growth: Growth, seed: fx.Node, cast: bool) -> Iterator[tuple[list[fx.Node], OpOverload | None, str]]:
    """The region of a product that becomes an operator, and why none that is larger does; without one the largest."""
    refused = list[tuple[list[fx.Node], str]]()
    for members in growth.candidates(seed):
        operator = _operator(growth, members, cast)
        if not isinstance(operator, str):
            growth.taken.update(members)
            yield members, operator, "; ".join(f"{_beyond('with', more, members)}{why}" for more, why in refused)
            return
        refused.append((members, operator))
    if refused:
        largest, why = refused[0]
        rest = [f"{_beyond('without', largest, members)}{other}" for members, other in refused[1:] if other != why]
        yield largest, None, "; ".join([why, *rest])


def _beyond(word: str, one: list[fx.Node], other: list[fx.Node]) -> str:
    return f"{word} {' '.join(opname(n) for n in one if n not in other)}: "


def _operator(growth: Growth, members: list[fx.Node], cast: bool) -> OpOverload | str:
    """The operator that a region becomes, or why there is none."""
    if not _on_gpu(members[-1]):
        return "on a CPU it is Inductor's to fuse"
    if cast:
        return "operators run in another precision than the graph records"
    if written := growth.written(members):
        return f"{written.name} is written to before the last of it is computed"
    inputs = _inputs(members)
    example = [_example(n) for n in inputs]
    if any(x is None for x in example):
        return "its columns are of a free size"
    notes = [f"{origin(n).owner} ({origin(n).line}): {opname(n)}" for n in members]
    return generated(_function(members, inputs), [x for x in example if x is not None], notes)


def _inputs(members: list[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(n for m in members for n in m.all_input_nodes if n not in members))


def _on_gpu(node: fx.Node) -> bool:
    return node.meta["val"].device.type == "cuda"


def _example(node: fx.Node) -> torch.Tensor | None:
    """A tensor like a node's value, with the sizes of the example; None if its last one is free."""
    value = fake(node)
    sizes: list[Any] = [] if value is None else list(value.shape)
    if value is None or (sizes and not isinstance(sizes[-1], int)):
        return None
    sizes = [s if isinstance(s, int) else s.node.hint for s in sizes]
    with fake_mode():
        return torch.empty(sizes, dtype=value.dtype)


@functools.cache
def fake_mode() -> FakeTensorMode:
    """One for all: making it imports Dynamo, half of the time of ``import gatecc``."""
    return FakeTensorMode()


def _function(members: list[fx.Node], inputs: list[fx.Node]) -> fx.GraphModule:
    """The region as a function of its inputs."""
    graph = fx.Graph()
    copied = {n: graph.placeholder(f"x{i}") for i, n in enumerate(inputs)}
    for node in members:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(copied[members[-1]])
    return fx.GraphModule({}, graph)
