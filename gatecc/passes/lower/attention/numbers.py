"""Numbers of a graph that are the same in every call, or that a guard can make the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import opname
from gatecc.ir.scalars import scalar

_FILLING = {"full": 1, "full_like": 1, "new_full": 2}
_FILLED = {"zeros": 0.0, "new_zeros": 0.0, "zeros_like": 0.0, "ones": 1.0, "new_ones": 1.0, "ones_like": 1.0}


def number(value: Any, flow: Flow) -> float | None:
    """A scalar of the graph. Under ``dynamic=True`` Dynamo hands the numbers of modules over as inputs, such as the
    scale of attention: the number of this call is taken, and a guard says so."""
    known = scalar(value, flow)
    if known is not None or not isinstance(value, fx.Node):
        return known
    held = value.meta.get("val")
    if not isinstance(held, torch.SymFloat | torch.SymInt) or free_unbacked_symbols(held):
        return None
    return float(held) if isinstance(held, torch.SymFloat) else None


def factor(node: fx.Node, source: fx.Node, flow: Flow) -> float | None:
    """What a node multiplies its source by: 1 for operators that do not scale, None if it is no such number."""
    name = opname(node)
    if name == "neg":
        return -1.0
    if name not in ("mul", "div"):
        return 1.0
    one, other = node.args[0], node.args[1]
    if one is other or (name == "div" and source is other):
        return None
    found = number(other if source is one else one, flow)
    if found is None or (name == "div" and not found):
        return None
    return found if name == "mul" else 1.0 / found


def filling(value: Any, flow: Flow) -> float | None:
    """The one number that a tensor holds, if it is a number at all."""
    name = opname(value) if isinstance(value, fx.Node) else ""
    if name in _FILLED and not flow.writers.get(value):
        return _FILLED[name]
    if name in _FILLING and not flow.writers.get(value):
        value = value.args[_FILLING[name]]
    return number(value, flow)
