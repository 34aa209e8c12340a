"""Grouped products of others: rows that are sorted by group, each times the matrix of its group.

torch has an operator for it, and transformers another, by which its mixtures of experts run (``grouped_mm``). Neither
has an ONNX form of its own, nor a count of FLOPs. transformers defines its operator when its experts are imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from gatecc.codegen.onnx.grouped import grouped_rows
from gatecc.codegen.onnx.lowering import Lowering
from gatecc.codegen.onnx.place import place
from gatecc.errors import ExportError
from gatecc.ir.ops import named
from gatecc.ops.registry import Operator, register, register_later


def _form(x: Tensor, weight: Tensor, offs: Tensor, bias: Tensor | None = None, out_dtype: Any = None) -> Tensor:
    """x: (S, K), weight: (G, K, N), offs: (G,), where each group ends -> (S, N); rows after the last end are zeros."""
    del bias
    ends = offs.long()
    edges = torch.cat([torch.zeros_like(ends[:1]), ends, torch.full_like(ends[:1], x.size(0))])
    y = grouped_rows(x, edges[1:] - edges[:-1], weight.mT)
    return y if out_dtype is None else y.to(out_dtype)


def _check(node: fx.Node) -> None:
    """Raise ExportError for what is no product of rows by sorted groups: two sets of matrices, a bias."""
    x, weight = (argument.meta["val"] for argument in node.all_input_nodes[:2])
    if x.dim() != 2 or weight.dim() != 3 or named(node, "offs") is None:
        raise _lacking(node, f"axes {x.dim()} and {weight.dim()}", "two: rows (S, K), and three: matrices (G, K, N)")
    if len(node.args) > 3 and node.args[3] is not None:
        raise _lacking(node, "a bias", "none")


def _lacking(node: fx.Node, found: str, expected: str) -> ExportError:
    return ExportError(
        "this grouped product has no ONNX form",
        where=place(node),
        found=found,
        expected=expected,
        do="write it as rows that are sorted by group, each times the matrix of its group, with offs",
    )


def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Each row meets one matrix, each column another; of two stacks each matrix meets that of its own place."""
    batch = x[0] if len(x) == len(weight) == 3 else 1
    return 2 * batch * x[-2] * x[-1] * weight[-1]


def _entry(overload: OpOverload) -> Operator:
    return Operator(overload=overload, onnx={"portable": Lowering(_form, _check)}, flops=_flops)


register(_entry(torch.ops.aten._grouped_mm.default))
register_later("transformers::grouped_mm_fallback", _entry)
