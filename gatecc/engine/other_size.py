"""One more: the example call with one sample more, along the axes that the captured graph says count samples.

The first axis is not always one of samples: a model may put the sequence first, take no batch at all, or hold
parameters for each position along it. What the sites of the graph call their batch axis is one; its symbolic size tells
in which inputs, and along which axis of each, samples are counted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sympy
import torch

from gatecc.capture.signature import OpaqueArgumentError, flatten, rebuild
from gatecc.ir.axes import TOKENS
from gatecc.ir.program import Program
from gatecc.ir.site import RNN, Attention, Site
from gatecc.ir.sizes import Size, UnknownSizeError, example_sizes, node_shape, symbols, value

Call = tuple[tuple[Any, ...], dict[str, Any]]
_BATCH = "bg"  # g: samples and heads merged
_TOLD_APART = ("q", "k", "v", "heads")


def one_more(
    programs: Sequence[Program], sites: Collection[Site], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Call | str:
    """The call with one sample more (the first ones repeated), or why there is none.

    ``programs`` and ``sites``: what was captured of the model that is called so.
    """
    try:
        _, leaves = flatten(args, kwargs)
    except OpaqueArgumentError:
        return "an input is neither a tensor nor a constant"
    whole = next((p for p in programs if not p.fqn), None)
    sites = [site for site in sites if site.is_part]  # what the axes of the model's own inputs count is to be found out
    try:
        axes = _of_equal_size(leaves) if whole is None else _of_graph(whole, sites, leaves)
        grown = [_longer(x.detach(), more) for x, more in zip(leaves, axes, strict=True)]
    except UnknownSizeError as e:
        return str(e)
    if not any(axes):
        return "no axis of an input is known to count samples"
    pairs = zip(leaves, grown, strict=True)
    return rebuild((args, kwargs), iter([more.requires_grad_(x.requires_grad) for x, more in pairs]))


Growth = dict[int, int]  # axis -> how many slices more


def _of_graph(program: Program, sites: Collection[Site], leaves: Sequence[torch.Tensor]) -> list[Growth]:
    sizes = example_sizes(program)
    samples = _samples(sites)
    if not samples:
        return _of_one_sample(sites, leaves)
    more = {s: n + (s in samples) for s, n in sizes.items()}
    counts, positions = {sizes[s] for s in samples if s in sizes}, _symbols(sites, TOKENS)
    found: list[Growth] = []
    for node, x in zip(program.placeholders, leaves, strict=True):
        shape = node.meta["val"].shape
        grown = {i: value(size, more) - x.shape[i] for i, size in enumerate(shape) if symbols(size) & samples}
        # An input that the graph does not read (a mask that hides nothing) has sizes of its own.
        free = [i for i, size in enumerate(shape) if x.shape[i] in counts and not symbols(size) & positions]
        found.append(grown or dict.fromkeys(free[:1], 1))
    return found


def _samples(sites: Collection[Site]) -> set[sympy.Symbol]:
    """The symbols that the batch axes of sites are made of, and no axis of positions is.

    Attention and recurrent layers know which axis is which; other sites take the first for the batch. They decide where
    windows of a sequence are a batch, too.
    """
    certain = [site for site in sites if isinstance(site, Attention | RNN)]
    found = _symbols(certain or sites, _BATCH) - _symbols(certain or sites, TOKENS)
    return (found - _symbols(sites, TOKENS) if len(found) > 1 else set()) or found


def _symbols(sites: Collection[Site], axes: str) -> set[sympy.Symbol]:
    return set[sympy.Symbol]().union(*(symbols(size) for size in _sizes(sites, axes)))


def _sizes(sites: Collection[Site], axes: str) -> list[Size]:
    """The sizes of these axes in the values of sites, of attention in those whose axes are told apart."""
    found: list[Size] = []
    for site in sites:
        for name, v in site.values.items():
            if not isinstance(site, Attention) or name in _TOLD_APART:
                shape = node_shape(v.node) or ()
                found += [size for axis, size in zip(v.axes, shape, strict=False) if axis in axes]
    return found


def _of_one_sample(sites: Collection[Site], leaves: Sequence[torch.Tensor]) -> list[Growth]:
    """A batch of one is a constant of the graph: the first axis of size 1 in each input, if sites have such a batch."""
    if 1 not in [size for size in _sizes(sites, _BATCH) if isinstance(size, int)]:
        return [{} for _ in leaves]
    return [{list(x.shape).index(1): 1} if 1 in x.shape else {} for x in leaves]


def _of_equal_size(leaves: Sequence[torch.Tensor]) -> list[Growth]:
    """Without a graph: the first axis, if all inputs have the same size along it."""
    if len({x.shape[0] for x in leaves if x.dim()}) > 1:
        return [{} for _ in leaves]
    return [{0: 1} if x.dim() else {} for x in leaves]


def _longer(x: torch.Tensor, more: Growth) -> torch.Tensor:
    for axis, count in more.items():
        if count > x.shape[axis]:
            raise UnknownSizeError(f"an input of size {x.shape[axis]} would grow by {count} with one sample more")
        x = torch.cat([x, x.narrow(axis, 0, count)], axis)
    return x
