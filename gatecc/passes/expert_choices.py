"""Choices of experts: how a graph made them, and some to try experts with."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, fx

from gatecc.ir.ops import opname


def choices(sizes: list[int], experts: int, generator: torch.Generator, *, distinct: bool) -> Iterator[Tensor]:
    """Indices (..., k): any, all tokens the same, all tokens the same other ones. Those of a top-k are distinct."""
    rows, k = prod(sizes[:-1]), sizes[-1]
    if distinct:
        yield torch.rand(rows, experts, generator=generator).argsort(-1)[:, :k].reshape(sizes)
    else:
        yield torch.randint(experts, sizes, generator=generator)
    yield torch.arange(k).remainder(experts).expand(sizes).clone()
    yield torch.arange(experts - k, experts).remainder(experts).flip(0).expand(sizes).clone()


def are_distinct(node: fx.Node) -> bool:
    """Whether indices were chosen by a top-k, which takes nobody twice."""
    return opname(chooser(node)) == "topk"


def chooser(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and opname(node) in ("getitem", "to", "_to_copy", "detach", "alias", "view"):
        node = node.all_input_nodes[0]
    return node


__all__ = ["are_distinct", "choices", "chooser"]
