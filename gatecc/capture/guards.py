"""Guards: what the sizes of the inputs must satisfy for a captured graph to be right.

torch.export records them as Python expressions over ``L["leaves"]``; a lower bound of 2 for every dynamic dimension is
part of the call's key already (see signature.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils._sympy.printers import PythonPrinter

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


class LaterGuards:
    """Sizes that become a number, or those of another input, after the capture: an edit whose trace asks torch of a
    size may bake in what it is in the example."""

    def __init__(self, placeholders: Sequence[torch.fx.Node]) -> None:
        values = [node.meta["val"] for node in placeholders if isinstance(node.meta.get("val"), torch.Tensor)]
        mode = detect_fake_mode(values)
        self._shapes = None if mode is None else mode.shape_env
        self._sources: dict[Any, sympy.Symbol] = {}
        for i, node in enumerate(placeholders):
            held = node.meta.get("val")
            sizes: Sequence[Any] = held.shape if isinstance(held, torch.Tensor) else ()
            for axis, size in enumerate(sizes):
                if isinstance(size, torch.SymInt) and isinstance(size.node._expr, sympy.Symbol):
                    source = sympy.Symbol(f"L['leaves'][{i}].size()[{axis}]")
                    self._sources.setdefault(size.node._expr, source)
        self._before = self._meaning()

    def _meaning(self) -> dict[Any, Any]:
        return {} if self._shapes is None else {symbol: self._shapes.replace(symbol) for symbol in self._sources}

    def found(self) -> list[str]:
        """The guards that came since this object was made."""
        now = self._meaning()
        changed = [s for s, e in now.items() if e != self._before[s] and e.free_symbols <= self._sources.keys()]
        return [f"{self._sources[s]} == {PythonPrinter().doprint(now[s].xreplace(self._sources))}" for s in changed]


def compile_guards(guards: Sequence[str]) -> Check:
    """One function ``check(leaves) -> bool`` from the guard expressions."""
    body = " and ".join(f"({g})" for g in guards) or "True"
    names: dict[str, Any] = {**SYMPY_INTERP, "math": math, "inf": math.inf}
    exec(f"def check(leaves):\n    L = {{'leaves': leaves}}\n    return bool({body})\n", names)
    return names["check"]
