"""``gatecc::moe_ffn`` in ONNX: rows sorted by expert, split where the experts change, products of an expert at a time.

All of it is in the standard. ``com.microsoft.MoE`` knows few activations, and gives zeros where its input comes from
another node and its weights are not normalised (ONNX Runtime 1.31).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from gatecc.codegen.onnx.grouped import grouped_rows
from gatecc.codegen.onnx.lowering import Lowering
from gatecc.codegen.onnx.scalars import scalar
from gatecc.ir.ops import named
from gatecc.ops.moe_ffn.arguments import read


def moe_ffn(*tensors: Tensor | None, **options: Any) -> Tensor:
    """The arguments and the result are the operator's. An index out of range is read as an empty slot."""
    a = read(tensors, options)
    E, k = a.experts, a.slots
    there = (a.indices >= 0) & (a.indices < E)
    flat = torch.where(there, a.indices, E).reshape(-1)
    order = torch.argsort(flat, stable=True)
    places = torch.arange(flat.size(0), device=flat.device)
    counts = (flat[:, None] == torch.arange(E + 1, device=flat.device)).sum(0)
    # Div of ONNX: what torch.onnx writes for whole quotients is eight nodes that mend those of negative numbers.
    factor = scalar(k, order.dtype, order.device)
    tokens = torch.onnx.ops.symbolic("Div", [order, factor], dtype=order.dtype, shape=order.shape, version=14)
    given = a.x.index_select(0, tokens)
    h = grouped_rows(given, counts, a.gate_up, a.gate_up_bias)
    y = grouped_rows(a.activation.hidden(h, a.layout), counts, a.down, a.down_bias)
    slots = y.index_select(0, torch.empty_like(order).scatter(0, order, places)).unflatten(0, (-1, k))
    slots = slots.to(a.wide) * torch.where(there, a.weights.to(a.wide), 0.0).unsqueeze(-1)
    return (slots.sum(1) if a.combine == "sum" else slots).to(a.x.dtype)


def _fixed(node: fx.Node) -> Iterator[Any]:
    """What the experts are: each has nodes of its own."""
    for name in ("gate_up", "down"):
        yield from named(node, name).meta["val"].shape


LOWERING = Lowering(moe_ffn, fixed=_fixed)
