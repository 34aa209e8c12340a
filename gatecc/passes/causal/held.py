"""Decays that are the same for all tokens: values that are made of weights or buffers alone, element by element.

A decay of each head may stand in a graph as it is, as its logarithm, or behind ``exp(-exp(rate))``, spread to every
pair of tokens or made anew for each. All of these are images of the weight that it comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from gatecc.ir.ops import opname
from gatecc.ir.program import fake, shape
from gatecc.ir.sizes import on_example
from gatecc.passes.causal.axes import ALIKE, rank

_PLACED = frozenset("view reshape _unsafe_view unsqueeze squeeze transpose permute t mT numpy_T flatten".split())
_OTHER = frozenset("expand expand_as zeros_like ones_like full_like copy fill zero".split())


def images(nodes: Sequence[fx.Node], held: Sequence[fx.Node]) -> list[fx.Node]:
    """The weights and what is made of them element by element, without equal ones, in order."""
    known: dict[fx.Node, int] = {}
    numbers: dict[object, int] = {}
    found: list[fx.Node] = []
    for node in (*held, *nodes):
        key: object = node
        if node not in held:
            if not _is_image(node, known):
                continue
            key = (node.target, _text(node.args, known), _text(node.kwargs, known))
        if key not in numbers:
            numbers[key] = len(numbers)
            found.append(node)
        known[node] = numbers[key]
    return found


def _is_image(node: fx.Node, known: dict[fx.Node, int]) -> bool:
    name, inputs = opname(node), [n for n in node.all_input_nodes if fake(n) is not None]
    plain = name in _PLACED or (name in ALIKE and name not in _OTHER)
    if fake(node) is None or not inputs or not plain or any(n not in known for n in inputs):
        return False
    return _count(node) <= max(map(_count, inputs))


def _count(node: fx.Node) -> int:
    return prod(on_example(size) or 1 for size in shape(node)) if rank(node) else 1


def _text(given: Any, known: dict[fx.Node, int]) -> str:
    return repr(map_aggregate(given, lambda item: f"%{known[item]}" if item in known else item))
