"""Scalars: numbers that a graph computes from numbers alone, such as the scale of attention."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import CASTS, VIEWS, opname
from gatecc.ir.sizes import node_shape, numel

_FOLD = {"sqrt": math.sqrt, "rsqrt": lambda x: 1 / math.sqrt(x), "reciprocal": lambda x: 1 / x, "neg": lambda x: -x}
_POWER = {"pow": lambda x, y: x**y, "mul": lambda x, y: x * y, "div": lambda x, y: x / y}


def scalar(value: Any, flow: Flow) -> float | None:
    """The value of a scalar that depends on neither input nor parameter."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    if flow.program.path(value) is None:
        return _computed(value, flow)
    tensor = flow.program.constant(value)
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None


def _computed(node: fx.Node, flow: Flow) -> float | None:
    """Fold the few operators that scales are written with: ``1 / sqrt(tensor(64.))``, ``tensor(d ** -0.5)``."""
    if node in flow.data or not node.args or flow.writers.get(node):
        return None
    shape = node_shape(node)
    if shape is None or numel(shape) != 1:
        return None
    name, operand = opname(node), scalar(node.args[0], flow)
    if name in ("full", "scalar_tensor"):
        filled = node.args[-1]
        return float(filled) if isinstance(filled, int | float) else None
    if operand is None:
        return None
    if name in VIEWS | CASTS:
        return operand
    if name in _POWER:
        other = scalar(node.args[1], flow)
        return None if other is None else _POWER[name](operand, other)
    return _FOLD[name](operand) if name in _FOLD else None
