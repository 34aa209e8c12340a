"""Bounds: between which numbers a value lies, told from the operators that made it.

A number that a state is multiplied by has a logarithm if it is not negative. And what is done to a gate inside of a
proved part (a clamp, an absolute value) shows only in numbers that it may hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import CASTS, VIEWS, argument, opname
from gatecc.ir.program import Program, fake

Interval = tuple[float, float]
INF = math.inf
ANYTHING: Interval = (-INF, INF)

_FIXED: Mapping[str, Interval] = {
    **dict.fromkeys("sigmoid softmax _softmax hardsigmoid ones ones_like new_ones rand rand_like".split(), (0.0, 1.0)),
    **dict.fromkeys("zeros zeros_like new_zeros".split(), (0.0, 0.0)),
    **dict.fromkeys("tanh sin cos erf".split(), (-1.0, 1.0)),
    **dict.fromkeys("softplus sqrt rsqrt abs square".split(), (0.0, INF)),
    **dict.fromkeys("log_sigmoid logsigmoid log_softmax _log_softmax".split(), (-INF, 0.0)),
}
_RISING: Mapping[str, Callable[[float], float]] = {
    "exp": lambda x: math.exp(min(x, 700.0)) if x < INF else INF,
    "exp2": lambda x: 2.0 ** min(x, 1000.0) if x < INF else INF,
    "expm1": lambda x: math.expm1(min(x, 700.0)) if x < INF else INF,
    "log": lambda x: math.log(x) if x > 0 else -INF,
    "log1p": lambda x: math.log1p(x) if x > -1 else -INF,
    "relu": lambda x: max(x, 0.0),
}
_KEPT = (VIEWS | CASTS | {"detach"}) - {"copy"}


class Bounds:
    """Of the values of a program as it is now."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: dict[fx.Node, Interval] = {}

    @cached_property
    def _flow(self) -> Flow:
        return Flow(self._program)

    def of(self, item: Any) -> Interval:
        """The least and the largest number that a value or a constant holds, infinite where nothing says it."""
        if isinstance(item, bool | int | float):
            return float(item), float(item)
        if not isinstance(item, fx.Node):
            return ANYTHING
        if item not in self._known:
            self._known[item] = ANYTHING  # while it is looked at
            self._known[item] = self._read(item)
        return self._known[item]

    def _read(self, node: fx.Node) -> Interval:
        held = fake(node)
        if held is None or self._flow.writers.get(self._flow.base.get(node, node)):
            return self.of(node.args[0]) if held is None and opname(node) in _KEPT else ANYTHING
        if held.dtype == torch.bool:
            return 0.0, 1.0
        if node.op == "get_attr":
            constant = self._program.constant(node)
            if isinstance(constant, Tensor) and not isinstance(constant, FakeTensor) and constant.numel():
                return float(constant.min()), float(constant.max())
        if node.op != "call_function" or not held.is_floating_point():
            return ANYTHING
        name = opname(node)
        if name in _FIXED:
            return _FIXED[name]
        if name in _RISING:
            low, high = self.of(node.args[0])
            return _RISING[name](low), _RISING[name](high)
        if name in _KEPT:
            return self.of(node.args[0])
        return self._joined(node, name) or self._clamped(node, name) or self._computed(node, name)

    def _joined(self, node: fx.Node, name: str) -> Interval | None:
        """Of values that stand side by side."""
        parts: list[Any]
        if name in ("cat", "stack") and isinstance(node.args[0], list | tuple):
            parts = list(node.args[0])
        elif name in ("where", "masked_fill") and len(node.args) == 3:
            parts = list(node.args[1:] if name == "where" else node.args[::2])
        elif name in ("pad", "constant_pad_nd") and argument(node, 2, "mode", "constant") in ("constant", 0, 0.0):
            parts = [node.args[0], 0.0]
        else:
            return None
        each = [self.of(part) for part in parts] or [ANYTHING]
        return min(low for low, _ in each), max(high for _, high in each)

    def _clamped(self, node: fx.Node, name: str) -> Interval | None:
        if name in ("minimum", "maximum"):
            choose = min if name == "minimum" else max
            one, two = (self.of(x) for x in node.args)
            return choose(one[0], two[0]), choose(one[1], two[1])
        if name not in ("clamp", "clip", "hardtanh", "clamp_min", "clamp_max"):
            return None
        low, high = self.of(node.args[0])
        least = None if name == "clamp_max" else argument(node, 1, "min")
        most = None if name == "clamp_min" else argument(node, 1 + (name != "clamp_max"), "max")
        if least is not None:
            low, high = (max(x, bound) for x, bound in zip((low, high), self.of(least), strict=True))
        if most is not None:
            low, high = (min(x, bound) for x, bound in zip((low, high), self.of(most), strict=True))
        return low, high

    def _computed(self, node: fx.Node, name: str) -> Interval:
        base, other = (*node.args, None, None)[:2]
        one, two = self.of(base), self.of(other)
        if name == "neg":
            return -one[1], -one[0]
        if name == "pow":
            even = other in (2, 4) or (isinstance(base, int | float) and base >= 0)
            return (0.0, INF) if even or one[0] >= 0 else ANYTHING
        if name == "reciprocal":
            return (0.0, INF) if one[0] >= 0 else ANYTHING
        if node.kwargs or other is None:
            return ANYTHING
        if name == "add":
            return _sum(one[0], two[0], -INF), _sum(one[1], two[1], INF)
        if name in ("sub", "rsub"):
            one, two = (one, two) if name == "sub" else (two, one)
            return _sum(one[0], -two[1], -INF), _sum(one[1], -two[0], INF)
        if name == "mul" and other is base:
            return 0.0, INF
        if name == "div" and isinstance(other, int | float) and other:
            two = (1 / other, 1 / other)
        elif name == "div":
            two = (0.0, INF) if two[0] >= 0 else (-INF, 0.0) if two[1] <= 0 else ANYTHING
        elif name != "mul":
            return ANYTHING
        products = [0.0 if not x or not y else x * y for x in one for y in two]
        return min(products), max(products)


def _sum(x: float, y: float, unknown: float) -> float:
    return unknown if math.isnan(x + y) else x + y
