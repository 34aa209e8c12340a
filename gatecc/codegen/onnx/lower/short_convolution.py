"""short-convolution: a causal convolution along tokens, each channel by itself, is one node that carries its state.

``CausalConvWithState`` is in the standard since opset 27, and in ONNX Runtime. Its kernel there takes a seventh of the
time at one token, and three times as long at hundreds, so that for ONNX Runtime it is written where a state is carried.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject, Target
from gatecc.codegen.onnx.lower.write import Writer
from gatecc.codegen.onnx.opset import CAUSAL_CONVOLUTION
from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import mutates, named, opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.program import fake
from gatecc.ir.sizes import node_shape, same

_OPERATORS: dict[Target, str] = {"ort": "com.microsoft::CausalConvWithState", "opset27": CAUSAL_CONVOLUTION}


@dataclass(frozen=True, eq=False)
class _Found:
    """x: (B, C, N) -> out, of the same shape. ``state``: (B, C, K - 1), the values before x; ``states``: what reads the
    last K - 1 values, those of x included."""

    conv: fx.Node
    x: fx.Node
    out: fx.Node
    state: fx.Node | None = None
    states: tuple[fx.Node, ...] = ()


class ShortConvolution(GraphLowering):
    """conv1d of x padded on the left, with silu behind it -> CausalConvWithState."""

    name = "short-convolution"
    targets = tuple(_OPERATORS)

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        flow = subject.flow()
        for node in list(subject.program.calls()):
            found = _found(node) if opname(node) == "conv1d" and _is_short(node) else None
            if found is None or (subject.target == "ort" and found.state is None):
                continue
            if any(mutates(n) or flow.writers.get(flow.base[n]) for n in (found.x, found.conv, found.out)):
                yield self.left(node, "a causal convolution", "a part of it is written to in place")
                continue
            yield self._write(subject, found, flow)

    def _write(self, subject: Subject, found: _Found, flow: Flow) -> Outcome:
        silu = _silu(found.out, flow)
        out = found.out if silu is None else silu
        writer = Writer(subject.program, out, self.name)
        weight, bias = (named(found.conv, name) for name in ("weight", "bias"))
        y, after = writer.several(
            _OPERATORS[subject.target],
            [found.x, weight, bias, found.state],
            {"activation": "none" if silu is None else "silu"},
            [tuple(out.meta["val"].shape), (*found.x.meta["val"].shape[:2], _width(found.conv) - 1)],
            out.meta["val"].dtype,
        )
        out.replace_all_uses_with(y)
        for node in found.states:
            node.replace_all_uses_with(after)
        return self.done(found.conv, "a causal convolution", "CausalConvWithState" + " with SiLU" * (silu is not None))


def _width(conv: fx.Node) -> int:
    return int((node_shape(named(conv, "weight")) or (0, 0, 0))[2])


def _is_short(conv: fx.Node) -> bool:
    """Whether each channel goes by itself, at every token, in a dtype that the kernels have."""
    weight, held = node_shape(named(conv, "weight")), fake(conv)
    return bool(
        weight is not None
        and held is not None
        and held.dim() == 3
        and held.dtype == torch.float32
        and weight[1] == 1
        and named(conv, "groups") == weight[0]
        and weight[2] > 1
        and _numbers(named(conv, "stride")) == _numbers(named(conv, "dilation")) == [1]
    )


def _numbers(given: Any) -> list[Any]:
    return [given] if isinstance(given, int) else list(given)


def _found(conv: fx.Node) -> _Found | None:
    source, padding, before = named(conv, "input"), named(conv, "padding"), _width(conv) - 1
    if _numbers(padding) == [before]:
        cut = next(iter(conv.users)) if len(conv.users) == 1 else None
        return _Found(conv, source, cut) if cut is not None and _is_first(cut, conv, source) else None
    if _numbers(padding) != [0]:
        return None
    if opname(source) in ("pad", "constant_pad_nd") and _numbers(source.args[1]) == [before, 0]:
        value = named(source, "value")
        zeros = opname(source) != "pad" or source.args[2] == "constant"
        x = source.args[0]
        return _Found(conv, x, conv) if zeros and not value and isinstance(x, fx.Node) else None
    return _carried(conv, source, before) if opname(source) == "cat" else None


def _is_first(cut: fx.Node, conv: fx.Node, x: fx.Node) -> bool:
    """Whether a node takes the first values of the convolution, as many as x has."""
    one, other = node_shape(cut), node_shape(x)
    first = opname(cut) == "slice" and cut.args[:2] == (conv, 2) and cut.args[2] in (None, 0) and cut.args[4] == 1
    return bool(first and one is not None and other is not None and same(one[2], other[2]))


def _carried(conv: fx.Node, joined: fx.Node, before: int) -> _Found | None:
    """A state of K - 1 values in front of x."""
    parts: Any = joined.args[0]
    if len(parts) != 2 or joined.args[1] not in (2, -1):
        return None
    state, x = parts
    held = node_shape(state)
    if held is None or not same(held[2], before):
        return None
    states = tuple(n for n in joined.users if n is not conv and _is_last(n, joined, x, before))
    return _Found(conv, x, conv, state, states)


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


def _silu(out: fx.Node, flow: Flow) -> fx.Node | None:
    """SiLU of nothing but this value."""
    user = next(iter(out.users)) if len(out.users) == 1 else None
    alone = user is not None and opname(user) == "silu" and not mutates(user) and not flow.writers.get(flow.base[user])
    return user if alone else None


__all__ = ["ShortConvolution"]
