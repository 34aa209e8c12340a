"""Guards: what the sizes of the inputs must satisfy for a captured graph to be right.

torch.export records them as Python expressions over ``L["leaves"]``; a lower bound of 2 for every dynamic dimension is
part of the call's key already (see signature.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

_UNBOUNDED = 2**31  # sizes beyond this are torch's infinities

Check = Callable[[Sequence[torch.Tensor]], bool]


def size_guards(exported: ExportedProgram, placeholders: Sequence[torch.fx.Node]) -> list[str]:
    """The guards of an exported program whose only inputs are ``*leaves``: static sizes, equal sizes, bounds,
    relations."""
    # An example that is a view is compared with what it is a view of, which the next call's need not be.
    code = [guard for guard in exported._guards_code if "._base" not in guard]
    for i, node in enumerate(placeholders):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        for axis, size in enumerate(value.shape):
            code.extend(_bounds(exported, f"L['leaves'][{i}].size()[{axis}]", size))
    return list(dict.fromkeys(code))


def _bounds(exported: ExportedProgram, source: str, size: Any) -> list[str]:
    if isinstance(size, int):
        return [f"{source} == {size}"]
    expression = size.node.expr
    bounds = exported.range_constraints.get(expression)
    if bounds is None:
        return []
    rows: list[str] = []
    if 2 < bounds.lower < _UNBOUNDED:
        rows.append(f"{source} >= {int(bounds.lower)}")
    if bounds.upper < _UNBOUNDED:
        rows.append(f"{source} <= {int(bounds.upper)}")
    return rows


def compile_guards(guards: Sequence[str]) -> Check:
    """One function ``check(leaves) -> bool`` from the guard expressions."""
    body = " and ".join(f"({g})" for g in guards) or "True"
    names: dict[str, Any] = {**SYMPY_INTERP, "math": math, "inf": math.inf}
    exec(f"def check(leaves):\n    L = {{'leaves': leaves}}\n    return bool({body})\n", names)
    return names["check"]
