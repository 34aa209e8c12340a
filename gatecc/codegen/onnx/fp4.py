"""FP4: matrices as numbers of four bits would hold them, in the type that they have (LLM-FP4, Liu et al. 2023).

The largest number of each column is searched for, which is the real-valued bias of the exponent there. This file
imports neither gatecc nor torch: the process that quantises a large model runs it by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_SHARES = np.linspace(1.0, 0.5, 21)  # of the largest entry of a column, tried as the largest number of its grid
_COLUMNS = 256  # at a time: a few copies of so many are held


def rounded(x: Any, largest: Any, exponent: int = 2, mantissa: int = 1) -> Any:
    """x in numbers of a sign, so many bits of exponent and of mantissa, whose largest is ``largest`` (above 0)."""
    top = (2 - 2.0**-mantissa) * 2.0 ** (2**exponent - 2)
    unit = largest / top
    y = np.clip(x / unit, -top, top)
    step = 2.0 ** (np.maximum(np.frexp(y)[1] - 1, 0) - mantissa)  # below 1 numbers are as far apart as from 1 to 2
    return np.rint(y / step) * step * unit


def columns(weight: Any) -> Any:
    """A matrix (K, N) in FP4 (E2M1), with a grid for each column: of those tried, that of the least squared error."""
    made = np.empty_like(weight)
    for start in range(0, weight.shape[1], _COLUMNS):
        w = weight[:, start : start + _COLUMNS].astype(np.float64)
        widest = np.abs(w).max(0, initial=0.0)
        widest[widest == 0] = 1.0
        best, least = w, np.full(w.shape[1], np.inf)
        for share in _SHARES:
            tried = rounded(w, share * widest)
            error = ((tried - w) ** 2).sum(0)
            best = np.where(error < least, tried, best)
            least = np.minimum(error, least)
        made[:, start : start + _COLUMNS] = best
    return made


def fake(model: Any, left: Sequence[str]) -> dict[str, int]:
    """Give products with a constant matrix, but those ``left``, what FP4 makes of it. Returns how many there are."""
    from onnx import numpy_helper

    held = {t.name: t for t in model.graph.initializer}
    count, done = 0, set[str]()
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.domain or node.name in left or node.input[1] not in held:
            continue
        weight = held[node.input[1]]
        name = f"{weight.name}_fp4"
        if name not in done:
            done.add(name)
            model.graph.initializer.append(numpy_helper.from_array(columns(numpy_helper.to_array(weight)), name))
        node.input[1] = name
        count += 1
    return {"MatMul": count} if count else {}
