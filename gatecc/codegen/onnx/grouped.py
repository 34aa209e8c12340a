"""Grouped: rows times the matrix of their group, which is how a mixture of experts runs its experts.

transformers has an operator of its own for it, torch another; rows are sorted by group, ``ends`` says where each group
ends. In ONNX the rows are split, each part meets its matrix, and the parts are joined: nothing is computed for experts
that got no token, and the number of tokens stays free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def grouped_products() -> dict[Any, Callable[..., Any]]:
    """Translations for ``torch.onnx.export(custom_translation_table=...)`` of the operators that this process has."""
    found: dict[Any, Callable[..., Any]] = {torch.ops.aten._grouped_mm.default: _grouped}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        found[torch.ops.transformers.grouped_mm_fallback.default] = _grouped
    return found


def _grouped(x: Any, weight: Any, ends: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """x: (S, K), weight: (G, K, N), ends: (G,) -> (S, N); rows after the last end are zeros."""
    from onnxscript import opset18

    del out_dtype
    op: Any = opset18
    groups = weight.shape[0]
    if ends is None or bias is not None or len(x.shape) != 2 or not isinstance(groups, int):
        raise NotImplementedError("a grouped product other than of rows that are sorted by group, without bias")
    ends = op.Cast(ends, to=7)  # int64
    start = op.Constant(value_ints=[0])
    parts: list[Any] = []
    for group in range(groups):
        here = op.Constant(value_ints=[group])
        end = op.Gather(ends, here, axis=0)
        rows = op.Slice(x, start, end, op.Constant(value_ints=[0]))
        parts.append(op.MatMul(rows, op.Gather(weight, op.Constant(value_int=group), axis=0)))
        start = end
    tail = op.Slice(x, start, op.Shape(x, start=0, end=1), op.Constant(value_ints=[0]))
    width = op.Gather(weight, op.Constant(value_int=0), axis=0)
    parts.append(op.Mul(op.MatMul(tail, width), op.CastLike(op.Constant(value_float=0.0), x)))
    return op.Concat(*parts, axis=0)
