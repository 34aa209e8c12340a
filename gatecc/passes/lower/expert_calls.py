"""Where experts may stand in a graph: the weights and indices with which a result is mixed of experts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product

import torch
from torch import fx

from gatecc.ir.ops import opname
from gatecc.ir.program import Program, fake, origin, shape
from gatecc.ir.sizes import on_example
from gatecc.passes.expert_formula import Call, is_sparse

TRIES = 12  # pairs of weights and indices that are tried at a place that does not name them
NO_CHOICE = "nothing chooses experts: no whole numbers per token"
_DENSE = 3  # values with a number per expert that are tried
_MAXIMA = ("argmax", "max")


def calls(program: Program, x: fx.Node, out: fx.Node, experts: int) -> Iterator[Call]:
    """The values between which the experts may stand, the likeliest first. ``x``: the tokens."""
    needed = _needed(out)
    chosen = [n for n in needed if _chooses(n, x)]
    pairs = ((w, i) for i, w in product(chosen, reversed(needed)) if w is not i and _fits(w, i) and w < out)
    for weights, indices in islice(pairs, TRIES):
        yield Call(x, weights, indices, out)
    dense = ((w, i) for i, w in product(chosen, reversed(needed)) if w < out and _holds_all(w, i, experts))
    for weights, indices in islice(dense, _DENSE):
        if is_sparse(program, x, weights, indices):
            yield Call(x, weights, indices, out)


def _needed(out: fx.Node) -> list[fx.Node]:
    """The calls that a value depends on, in order; of writers into what it reads, too."""
    seen, todo = {out}, [out]
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in seen and n.op == "call_function"]
        seen.update(new)
        todo += new
    return sorted(seen)


def _chooses(node: fx.Node, x: fx.Node) -> bool:
    """Whether a value holds the indices of a top-k, or of the largest: (..., k), or (...) for k = 1."""
    held = fake(node)
    if held is None or held.dtype != torch.int64 or held.dim() < 1:
        return False
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    if opname(source) in _MAXIMA or opname(node) in _MAXIMA:
        return held.dim() > 1 or len(shape(x)) == 2
    return held.dim() > 1 and (opname(source) in ("topk", "sort") or opname(node) in ("slice", "narrow"))


def _sizes(node: fx.Node) -> list[int | None]:
    return [on_example(size) for size in shape(node)]


def _fits(weights: fx.Node, indices: fx.Node) -> bool:
    """Whether a value holds a number for each of the indices, of the same call of a module."""
    held = fake(weights)
    if held is None or not held.is_floating_point():
        return False
    return _sizes(weights) == _sizes(indices) and origin(weights).owner == origin(indices).owner


def _holds_all(weights: fx.Node, indices: fx.Node, experts: int) -> bool:
    """Whether a value holds a number for each expert, after a top-k of fewer."""
    held, sizes = fake(weights), _sizes(indices)
    if held is None or not held.is_floating_point() or opname(indices.all_input_nodes[0]) != "topk":
        return False
    return _sizes(weights) == [*sizes[:-1], experts] and sizes[-1] != experts and indices < weights
