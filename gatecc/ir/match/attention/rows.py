"""Rows: which output features of a projection reach queries, keys or values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from gatecc.ir.evaluate import Evaluator, UnprovableError
from gatecc.ir.match.attention.origins import Origins
from gatecc.ir.match.projection import Projection
from gatecc.ir.ops import CASTS, VIEWS, opname
from gatecc.ir.site import Weight
from gatecc.ir.sizes import Sizes, UnknownSizeError, value


@dataclass(frozen=True)
class Rows:
    """The output features of a projection that reach a value: ``count`` of them; ``range`` if they are consecutive."""

    count: int
    range: tuple[int, int] | None


def row_numbers(origins: Origins, evaluator: Evaluator, sizes: Sizes) -> tuple[fx.Node, torch.Tensor] | None:
    """The number of the projection's output feature that every element of a value comes from.

    They are sent through the views that split it; the node is the last of these views.
    """
    source = origins.projection
    chain = _view_chain(source.node, origins.between)
    last = chain[-1] if chain else source.node
    part = evaluator.slice(last, given=frozenset({source.node}))
    for values in (dict.fromkeys(sizes, 1), sizes):  # one token is enough, unless the views mix tokens
        try:
            numbers = evaluator.run(part, values, {source.node: _numbered(source, values)})
        except (UnprovableError, UnknownSizeError, RuntimeError):
            continue
        if numbers.numel():
            return last, numbers
    return None


def rows_of(numbers: torch.Tensor | None) -> Rows | None:
    """Which rows of a (fused) weight make the value."""
    if numbers is None:
        return None
    seen = numbers.unique()
    first, last = int(seen[0]), int(seen[-1]) + 1
    return Rows(len(seen), (first, last) if last - first == len(seen) else None)


def _numbered(source: Projection, sizes: Sizes) -> torch.Tensor:
    """A tensor of the projection's shape that holds the number of its output feature everywhere."""
    shape = [value(s, sizes) for s in source.node.meta["val"].shape]
    if source.conv:
        return torch.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    tail = len(shape)
    while tail and torch.Size(shape[tail:]).numel() < source.out_width:
        tail -= 1
    return torch.arange(source.out_width).reshape(shape[tail:]).expand(shape)


def _view_chain(start: fx.Node, between: list[fx.Node]) -> list[fx.Node]:
    """The views after ``start`` up to where the paths to the value part or something else is done."""
    inside, chain, node = set(between), list[fx.Node](), start
    while True:
        users = [u for u in node.users if u in inside]
        if len(users) != 1 or opname(users[0]) not in VIEWS | CASTS or users[0].all_input_nodes[0] is not node:
            break
        node = users[0]
        chain.append(node)
    while chain and not isinstance(chain[-1].meta.get("val"), torch.Tensor):
        chain.pop()
    return chain


def weight_of(origins: Origins, rows: Rows | None) -> Weight:
    """The weight as a role of a site."""
    source = origins.projection
    assert source.weight is not None
    part = None if rows is None or rows.count == source.out_width else rows.range
    if source.weight.rows is not None:
        first, last = part or (0, source.out_width)
        part = source.weight.rows[0] + first, source.weight.rows[0] + last
    return replace(source.weight, rows=part)
