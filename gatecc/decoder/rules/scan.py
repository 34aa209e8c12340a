"""Step rules of token mixers other than attention: causal convolutions and cumulative operators.

Delays are in gatecc.decoder.rules.delays, operators that carry a state in gatecc.decoder.rules.operators.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from gatecc.decoder.analysis.axes import Lengths
from gatecc.decoder.refuse import refusal
from gatecc.decoder.rules.delays import SHIFTS, delay
from gatecc.decoder.rules.operators import resume
from gatecc.decoder.rules.slots import Slot, carried, extended
from gatecc.ir.ops import argument, named, opname
from gatecc.ir.program import META, Program, origin
from gatecc.ir.sizes import node_shape, same
from gatecc.ops import registry

_CUMULATIVE = {"cumsum": 0.0, "cumprod": 1.0, "logcumsumexp": float("-inf")}  # and what they start from
_PADS = frozenset(("pad", "constant_pad_nd"))


def scans(program: Program, data: set[fx.Node], slots: list[Slot], lengths: Lengths) -> None:
    """Put slots at every token mixer that has a rule. ``data``: the nodes that depend on the tokens.

    Raises DecoderError for one that looks ahead. What has no rule is left to the labels, which refuse it.
    """
    for node in list(program.graph.nodes):
        name = opname(node)
        if node not in data or node.op != "call_function":
            continue
        if name in _CUMULATIVE:
            _cumulative(node, slots, lengths)
        elif name == "conv1d":
            _convolution(node, slots, lengths)
        elif name in SHIFTS:
            delay(node, slots, lengths)
        else:
            found = registry.find(node.target)
            if found is not None and found.step is not None:
                resume(node, found.step, slots, lengths)


# --- cumulative operators -------------------------------------------------------------------------------------------


def _cumulative(node: fx.Node, slots: list[Slot], lengths: Lengths) -> None:
    """cumsum and its like along the positions: the value so far is combined with those of the new tokens."""
    shape = node_shape(node) or ()
    axis = int(argument(node, 1, "dim")) % max(1, len(shape))
    if not shape or not lengths.pure(shape[axis]):
        return
    slots.append(Slot("scan", node, axis, fill=_CUMULATIVE[opname(node)], owner=origin(node).owner))
    _behind(node, carried, len(slots) - 1)


def _behind(node: fx.Node, mark: Any, slot: int) -> fx.Node:
    """Let every reader of ``node`` read a mark on it."""
    with node.graph.inserting_after(node):
        made = node.graph.call_function(mark, (node, slot))
    made.meta = {"val": node.meta["val"], META: node.meta.get(META)}
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return made


# --- causal convolution ---------------------------------------------------------------------------------------------


def _convolution(node: fx.Node, slots: list[Slot], lengths: Lengths) -> None:
    """A convolution over the positions that sees only the past: its input is continued on the left by what came before.

    Two spellings: padded on both sides and cut to the length; padded on the left before it.
    """
    source, weight = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    shape = list(node_shape(source) or (1,))
    if not lengths.has(shape[-1]):
        return
    stride, padding, dilation = (_one(named(node, name)) for name in ("stride", "padding", "dilation"))
    taps = (int((node_shape(weight) or (1,))[-1]) - 1) * dilation if isinstance(dilation, int) else -1
    if stride != 1 or taps < 0 or not isinstance(padding, int):
        raise refusal(node, f"a convolution over the positions with stride {stride} and padding {padding}")
    if taps == 0 and padding == 0:
        raise refusal(node, "a convolution of one tap over the positions", do="write it as a linear map")
    before = source if padding else _padded_on_the_left(source, taps, lengths)
    cut = _cut(node, before) if padding == taps and before is not None else None
    if before is None or (padding and cut is None) or not lengths.pure((node_shape(before) or (1,))[-1]):
        raise refusal(node, "this convolution over the positions does not prove causal", do="pad it on the left alone")
    slots.append(Slot("taps", before, len(shape) - 1, count=taps, owner=origin(node).owner))
    graph = node.graph
    with graph.inserting_before(node):
        longer = graph.call_function(extended, (before, len(slots) - 1))
    longer.meta = {"val": source.meta["val"], META: node.meta.get(META)}
    node.args = (longer, weight, named(node, "bias"), [1], [0], [dilation], named(node, "groups"))
    node.kwargs = {}
    if cut is not None:
        node.meta["val"] = cut.meta["val"]
        cut.replace_all_uses_with(node)


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _padded_on_the_left(node: fx.Node, taps: int, lengths: Lengths) -> fx.Node | None:
    """The tensor that ``node`` is with ``taps`` zeros on its left."""
    if opname(node) not in _PADS or not isinstance(node.args[0], fx.Node):
        return None
    pad = list(argument(node, 1, "pad"))
    zero = argument(node, 3 if opname(node) == "pad" else 2, "value", 0) in (None, 0, 0.0)
    constant = opname(node) != "pad" or argument(node, 2, "mode", "constant") == "constant"
    return node.args[0] if zero and constant and pad[:2] == [taps, 0] and not any(pad[2:]) else None


def _cut(node: fx.Node, source: fx.Node) -> fx.Node | None:
    """The slice that keeps the first positions of a convolution, as many as its input has."""
    users = list(node.users)
    if len(users) != 1 or opname(users[0]) != "slice":
        return None
    cut = users[0]
    axis = int(argument(cut, 1, "dim", 0)) % 3
    first = argument(cut, 2, "start") in (None, 0)
    kept = same((node_shape(cut) or (0,))[-1], (node_shape(source) or (1,))[-1])
    return cut if axis == 2 and first and kept else None
