"""Causal convolutions along tokens, each channel by itself: padded on both sides and cut, padded on the left, or with a
state in front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import mutates, named, opname
from gatecc.ir.program import fake
from gatecc.ir.sizes import node_shape, same


@dataclass(frozen=True, eq=False)
class CausalConvolution:
    """x: (B, C, N) -> out, of the same shape. ``state``: (B, C, K - 1), the values before x; ``states``: what reads the
    last K - 1 values, those of x included."""

    conv: fx.Node
    x: fx.Node
    out: fx.Node
    state: fx.Node | None = None
    states: tuple[fx.Node, ...] = ()


def width(conv: fx.Node) -> int:
    """Its taps."""
    return int((node_shape(named(conv, "weight")) or (0, 0, 0))[2])


def _is_short(conv: fx.Node) -> bool:
    """Whether each channel goes by itself, at every token."""
    weight, held = node_shape(named(conv, "weight")), fake(conv)
    return bool(
        weight is not None
        and held is not None
        and held.dim() == 3
        and weight[1] == 1
        and named(conv, "groups") == weight[0]
        and weight[2] > 1
        and _numbers(named(conv, "stride")) == _numbers(named(conv, "dilation")) == [1]
    )


def _numbers(given: Any) -> list[Any]:
    return [given] if isinstance(given, int) else list(given)


def causal_convolution(conv: fx.Node) -> CausalConvolution | None:
    """What a call of conv1d computes, if it is one."""
    if opname(conv) != "conv1d" or not _is_short(conv):
        return None
    source, padding, before = named(conv, "input"), named(conv, "padding"), width(conv) - 1
    if _numbers(padding) == [before]:
        cut = next(iter(conv.users)) if len(conv.users) == 1 else None
        return CausalConvolution(conv, source, cut) if cut is not None and _is_first(cut, conv, source) else None
    if _numbers(padding) != [0]:
        return None
    if opname(source) in ("pad", "constant_pad_nd") and _numbers(source.args[1]) == [before, 0]:
        value = named(source, "value")
        zeros = opname(source) != "pad" or source.args[2] == "constant"
        x = source.args[0]
        return CausalConvolution(conv, x, conv) if zeros and not value and isinstance(x, fx.Node) else None
    return _carried(conv, source, before) if opname(source) == "cat" else None


def _is_first(cut: fx.Node, conv: fx.Node, x: fx.Node) -> bool:
    """Whether a node takes the first values of the convolution, as many as x has."""
    one, other = node_shape(cut), node_shape(x)
    first = opname(cut) == "slice" and cut.args[:2] == (conv, 2) and cut.args[2] in (None, 0) and cut.args[4] == 1
    return bool(first and one is not None and other is not None and same(one[2], other[2]))


def _carried(conv: fx.Node, joined: fx.Node, before: int) -> CausalConvolution | None:
    """A state of K - 1 values in front of x."""
    parts: Any = joined.args[0]
    if len(parts) != 2 or joined.args[1] not in (2, -1):
        return None
    state, x = parts
    held = node_shape(state)
    if held is None or not same(held[2], before):
        return None
    states = tuple(n for n in joined.users if n is not conv and _is_last(n, joined, x, before))
    return CausalConvolution(conv, x, conv, state, states)


def _is_last(node: fx.Node, joined: fx.Node, x: fx.Node, before: int) -> bool:
    """Whether a node takes the last K - 1 values of what was joined."""
    if opname(node) not in ("narrow", "slice") or node.args[0] is not joined or node.args[1] not in (2, -1):
        return False
    start: Any = node.args[2]
    start = start.meta["val"] if isinstance(start, fx.Node) else start
    length, taken = node_shape(x), node_shape(node)
    if length is None or taken is None or not same(taken[2], before):
        return False
    return start == -before if isinstance(start, int) and start < 0 else start is not None and same(start, length[2])


def silu_of(out: fx.Node, flow: Flow) -> fx.Node | None:
    """What alone reads a value, if that is SiLU."""
    user = next(iter(out.users)) if len(out.users) == 1 else None
    alone = user is not None and opname(user) == "silu" and not mutates(user) and not flow.writers.get(flow.base[user])
    return user if alone else None


__all__ = ["CausalConvolution", "causal_convolution", "silu_of", "width"]
