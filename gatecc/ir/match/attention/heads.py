"""Naming the batch axes of queries: which is the batch, which the heads, and what else there is."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from gatecc.ir.match.attention.origins import Origins
from gatecc.ir.match.axes import axis_after, permutation
from gatecc.ir.ops import CASTS, RESHAPES, TRANSPOSES, opname
from gatecc.ir.sizes import Size, expression, node_shape, numel, same

_MOVES = (
    RESHAPES | TRANSPOSES | frozenset("unbind select getitem split chunk index index_select unsqueeze squeeze".split())
)


def heads_by_size(node: fx.Node, origins: Origins | None, width: int = -1) -> int | None:
    """Heads = elements of q per token and feature, in units of d, the axis ``width``. None if no projection tells what
    a token is."""
    shape = node_shape(node)
    if origins is not None and origins.part is not None:
        shape = node_shape(origins.part)  # each part of joined tokens has as many heads as the whole
    if origins is None or shape is None:
        return None
    made = node_shape(origins.projection.node) or ()
    channels = made[origins.projection.channels]
    ratio = sympy.cancel(numel(shape) * expression(channels) / (expression(shape[width]) * numel(made)))
    return int(ratio) if ratio.is_Integer else None


def batch_letters(
    axes: list[int],
    node: fx.Node,
    origins: Origins | None,
    numbers: tuple[fx.Node, torch.Tensor] | None,
    width: int = -1,
) -> str:
    """The letters of the axes ``axes`` of queries: b batch, h heads, w windows, r heads that share a key, g merged.

    Different heads come from different features of the projection, different samples and windows from the same ones;
    where the features cannot be followed (``numbers``), sizes decide. ``width`` is the axis of a head's features.
    """
    shape = node_shape(node) or ()
    sizes, heads = [shape[i] if i < len(shape) else 1 for i in axes], heads_by_size(node, origins, width)
    if len(axes) == 1:
        merged = (heads is not None and heads > 1) or (heads is None and _is_merged(node))
        return "g" if merged else "b"
    followed = _followed(axes, node, origins, numbers)
    if followed and not any(followed):  # a single head: its axis has size 1
        followed = _single_head(sizes)
    if any(followed):
        own, shared = iter("hr"), iter("bwg")
        return "".join(next(own, "g") if varies else next(shared) for varies in followed)
    if len(axes) == 2:
        return "hb" if heads is not None and same(sizes[0], heads) and not same(sizes[1], heads) else "bh"
    if len(axes) == 3 and heads is not None and same(sizes[1], heads) and not same(sizes[2], heads):
        return "bhw"
    if len(axes) == 3:
        return "bhr" if _is_grouped(sizes, heads) else "bwh"
    return "bwhr"[: len(axes)]


def _single_head(sizes: list[Size]) -> list[bool]:
    """The first axis of size 1 after the batch."""
    at = next((i for i, size in enumerate(sizes) if i and same(size, 1)), None)
    return [i == at for i in range(len(sizes))]


def _moves_batch(node: fx.Node) -> bool:
    """Whether a node may move other axes than the last two."""
    order = permutation(node, len(node_shape(node) or ())) if opname(node) in TRANSPOSES else None
    if order is not None:
        return order[:-2] != list(range(len(order) - 2))
    return opname(node) in _MOVES


def _is_grouped(sizes: list[Size], heads: int | None) -> bool:
    return heads is not None and not same(sizes[2], heads) and bool(numel(sizes[1:]) == heads)


def _followed(
    axes: list[int], node: fx.Node, origins: Origins | None, numbers: tuple[fx.Node, torch.Tensor] | None
) -> list[bool]:
    """Along which axes the feature numbers vary; nothing where the value was moved after they were taken."""
    if origins is None or numbers is None or numbers[1].ndim != len(node_shape(node) or ()):
        return []
    last, tensor = numbers
    after = origins.between[origins.between.index(last) + 1 :] if last in origins.between else origins.between
    if last is not node and any(_moves_batch(n) for n in after):
        return []
    return [i < tensor.ndim and bool((tensor != tensor.narrow(i, 0, 1)).any()) for i in axes]


def feature_axes(node: fx.Node, origins: Origins, numbers: tuple[fx.Node, torch.Tensor]) -> set[int]:
    """Along which axes of queries the features of the projection lie, as far as these can be followed."""
    last, tensor = numbers
    at = origins.between.index(last) + 1 if last in origins.between else 0
    found: set[int] = set()
    for axis in range(tensor.ndim):
        if bool((tensor == tensor.narrow(axis, 0, 1)).all()):
            continue
        runs: dict[fx.Node, int | None] = {last: axis}
        for step in origins.between[at:]:
            source = next((n for n in step.all_input_nodes if runs.get(n) is not None), None)
            runs[step] = axis_after(step, source, runs[source] or 0) if source is not None else None
        if (end := runs.get(node)) is not None:
            found.add(end)
    return found


def _is_merged(node: fx.Node) -> bool:
    while opname(node) in TRANSPOSES | CASTS | frozenset(("mul", "div", "contiguous")) and isinstance(
        node.args[0], fx.Node
    ):
        node = node.args[0]
    return opname(node) in RESHAPES and len(node_shape(node) or ()) == 3
