"""Embedding sites: token tables and the patch convolution, where the stream starts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from gatecc.ir.match.facts import Facts
from gatecc.ir.match.projection import Projection, behind, fqn
from gatecc.ir.match.registry import matcher
from gatecc.ir.ops import CASTS, RESHAPES, TRANSPOSES, argument, opname
from gatecc.ir.program import fake, shape
from gatecc.ir.refusals import refuse
from gatecc.ir.site import Embedding, Refusal, Value, Weight

_ONWARD = RESHAPES | TRANSPOSES | CASTS | frozenset("layer_norm contiguous clone dropout add".split())
_NEAR = 6  # nodes between a patch convolution and the flattening of its map


@matcher
def match_embedding(facts: Facts) -> Iterator[Embedding | Refusal]:
    """One site a look-up or patch convolution, in execution order; position tables are refused (GCC160)."""
    for node in facts.program.calls():
        if opname(node) == "embedding":
            found = _look_up(facts, node)
            if found is not None:
                yield found
        elif node in facts.projections and _is_patches(facts, facts.projections[node]):
            projection = facts.projections[node]
            values = {"in": facts.value(projection.inp), "out": facts.value(projection.out)}
            yield Embedding(**facts.place("embedding", node), values=values, weights=projection.weights)


def _look_up(facts: Facts, node: fx.Node) -> Embedding | Refusal | None:
    table, indices = behind(facts.program, node.args[0]), node.args[1]
    if not isinstance(indices, fx.Node):
        return None
    if indices not in facts.data:
        return refuse("GCC160", "embedding", node)
    if table is None or not isinstance(table[1], torch.nn.Parameter):
        return refuse("GCC130", "embedding", node)
    letters = {1: "b", 2: "bn"}.get(len(shape(indices)), "bn".rjust(len(shape(indices)), "b"))
    values = {"in": Value(indices, letters), "out": Value(node, letters + "c")}
    weight = Weight(fqn(facts.program, table[0], node), "in_out")
    return Embedding(**facts.place("embedding", node), values=values, weights={"weight": weight})


def _is_patches(facts: Facts, projection: Projection) -> bool:
    """A strided convolution of an input image or signal, whose windows are patches or whose map becomes tokens."""
    stride = argument(projection.node, 3, "stride", 1)
    strides = stride if isinstance(stride, (list, tuple)) else [stride]
    if not projection.conv or projection.x in facts.source or all(s == 1 for s in strides):
        return False
    held = fake(projection.x)
    if held is None or not held.dtype.is_floating_point or facts.program.fqn:
        return False
    found = behind(facts.program, argument(projection.node, 1, "weight"))
    kernel = [] if found is None else [int(size) for size in found[1].shape[2:]]
    whole = (
        kernel == [s for s in strides for _ in kernel][: len(kernel)] if len(strides) == 1 else kernel == list(strides)
    )
    return whole or _becomes_tokens(facts, projection.node)


def _becomes_tokens(facts: Facts, node: fx.Node) -> bool:
    for _ in range(_NEAR):
        onward = [user for user in node.users if opname(user) in _ONWARD]
        if not onward:
            return False
        node = onward[0]
        held = fake(node)
        if held is not None and facts.channel.get(node) == held.dim() - 1 and held.dim() > 2:
            return True
    return False
