"""Shortcuts: what a step for a single token may do otherwise than its program is written, with the same result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gatecc.decoder.analysis.axes import NOW, Span
from gatecc.decoder.emit.step import Step
from gatecc.ir.match.axes import permutation
from gatecc.ir.ops import TRANSPOSES, opname
from gatecc.ir.program import shape
from gatecc.ir.sizes import node_shape


@dataclass(frozen=True)
class Grouped:
    """Attention without a repetition of heads: those that share a key head lie side by side, as if they were queries of
    it. ``before`` and ``after``: the shapes of the queries and of the result, None where each has a head of its own.
    """

    keys: fx.Node
    values: fx.Node
    before: list[int] | None = None
    after: list[int] | None = None


def grouped(step: Step) -> dict[fx.Node, Grouped]:
    """The attentions of a single token that can read keys and values as they are kept."""
    written = {captured: node for node, captured in step.stands_for.items()}
    found: dict[fx.Node, Grouped] = {}
    for core, recalled in step.plan.fused.items() if step.single else ():
        node, keys, values = (written.get(n) for n in (core, recalled.keys, recalled.values))
        if node is None or keys is None or values is None or not recalled.plain or not recalled.group:
            continue
        if recalled.group == 1:
            found[node] = Grouped(keys, values)
            continue
        query = core.args[0]
        assert isinstance(query, fx.Node)
        (_, heads, _, width), (_, shared, _, _), out = shape(query), shape(recalled.keys), shape(recalled.values)[3]
        before, after = [shared, recalled.group, width], [heads, 1, out]
        if all(isinstance(size, int) for size in (*before, *after)):
            found[node] = Grouped(keys, values, [-1, *map(int, before)], [-1, *map(int, after)])
    return found


def reshapes(step: Step) -> dict[fx.Node, list[int]]:
    """The transposes that move no more than axes of size 1, and the shapes that they yield, -1 for an unknown size."""
    found: dict[fx.Node, list[int]] = {}
    for node, captured in step.stands_for.items() if step.single else ():
        if opname(captured) not in TRANSPOSES or captured.all_input_nodes[0] not in step.plan.labels.of:
            continue
        source = captured.all_input_nodes[0]
        spans = step.plan.labels.of[source]
        sizes = [_size(step, x, span) for x, span in zip(node_shape(source) or (), spans, strict=True)]
        order = permutation(captured, len(sizes))
        moved = None if order is None else [axis for axis in order if sizes[axis] != 1]
        if order is not None and moved == sorted(moved or ()) and sizes.count(-1) < 2:
            found[node] = [sizes[axis] for axis in order]
    return found


def _size(step: Step, size: Any, span: Span | None) -> int:
    """A size in a step for one token, -1 if it is not known before."""
    if isinstance(size, int):
        return size
    return 1 if span == NOW and step.plan.lengths.pure(size) else -1


def choice(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(number, x, y) of a node that is x if the number is above 0 and y otherwise."""
    if node.target is not torch.ops.aten.where.self:
        return None
    test, x, y = node.args
    if not isinstance(test, fx.Node) or test.target is not torch.ops.aten.gt.Scalar or test.args[1] != 0:
        return None
    number = test.args[0]
    if not isinstance(number, fx.Node) or number.target is not torch.ops.aten.scalar_tensor.default:
        return None
    held = number.args[0]
    return (held, x, y) if isinstance(held, fx.Node) and isinstance(x, fx.Node) and isinstance(y, fx.Node) else None
