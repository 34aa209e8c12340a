"""Padding: the input that says which keys are tokens, read off a mask that is nothing but that."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from gatecc.ir.evaluate import Evaluator, UnprovableError
from gatecc.ir.program import fake
from gatecc.ir.site import Attention
from gatecc.ir.sizes import node_shape, same, symbols

_SIZES = ((1, 1), (2, 5), (3, 8))  # samples and keys
_VALUES = (0, 1, 1, 1, 2)  # of the input; all that are not zero mean a token


def padding_input(site: Attention, evaluator: Evaluator) -> fx.Node | None:
    """The input (B, M) such that a query sees a key where it is not zero, and nothing else; None if it is otherwise.

    Where nothing is seen a mask of booleans gives zeros; one that is added gives the mean of the values, which no node
    does. The mask is evaluated at several sizes with random tokens, at least one in each sample.
    """
    mask = site.find("mask")
    shape = None if mask is None else node_shape(mask.node)
    held = None if mask is None else fake(mask.node)
    if mask is None or held is None or held.dtype != torch.bool or site.spelling != "sdpa":
        return None
    if shape is None or len(shape) != 4 or len(site.maskings) != 1:
        return None
    try:
        part = evaluator.slice(mask.node)
        given = part.inputs
        keys: Any = shape[-1]
        if len(given) != 1 or not _fits(given[0], keys):
            return None
        for batch, length in _SIZES:
            if not _is_plain(evaluator, part, given[0], shape, (batch, length)):
                return None
    except UnprovableError:
        return None
    return given[0]


def _fits(given: fx.Node, keys: Any) -> bool:
    held = given.meta["val"]
    return held.dim() == 2 and same(held.shape[1], keys) and held.dtype in (torch.int64, torch.int32, torch.bool)


def _is_plain(evaluator: Evaluator, part: Any, given: fx.Node, shape: Any, size: tuple[int, int]) -> bool:
    held: Any = given.meta["val"]
    # A size that is no free one is that of the graph.
    batch, length = (own if isinstance(own, int) else tried for own, tried in zip(held.shape, size, strict=True))
    samples, keys = symbols(held.shape[0]), symbols(held.shape[1])
    sizes: dict[sympy.Symbol, int] = {s: length for n in part.nodes for s in _symbols_of(n)}
    sizes |= dict.fromkeys(samples | symbols(shape[0]), batch) | dict.fromkeys(keys, length)
    generator = torch.Generator().manual_seed(batch)
    values = torch.tensor(_VALUES)[torch.randint(len(_VALUES), (batch, length), generator=generator)]
    values[:, length // 2] = 1
    found = evaluator.run(part, sizes, {given: values.to(held.dtype)})
    return bool((found == (values != 0)[:, None, None, :]).all())


def _symbols_of(node: fx.Node) -> list[sympy.Symbol]:
    held = node.meta.get("val")
    sizes = held.shape if isinstance(held, Tensor) else [held]
    return [s for size in sizes if isinstance(size, torch.SymInt) for s in symbols(size)]
