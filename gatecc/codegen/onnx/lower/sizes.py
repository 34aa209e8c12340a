"""Sizes as values: what nodes of attention take as inputs, made once for all layers."""

from __future__ import annotations

import torch
from torch import fx

from gatecc.codegen.onnx.lower.lowering import Subject
from gatecc.codegen.onnx.lower.write import Writer, aten
from gatecc.ir.sizes import expression, same


def key_counts(writer: Writer, subject: Subject, out: fx.Node, source: fx.Node) -> tuple[fx.Node, fx.Node]:
    """For GroupQueryAttention without a cache: the place of each row's last key (B,), and the number of keys (1,)."""
    B, _, N, _ = out.meta["val"].shape
    key = ("key_counts", expression(B), expression(N))
    if key not in subject.shared:
        tokens = one_size(writer, N, source)
        total = writer.shaped("Cast", [tokens], {"to": 6}, (1,), torch.int32)
        last = writer.call(aten.sub.Tensor, total, 1)
        batch = one_size(writer, B, source)
        subject.shared[key] = writer.shaped("Expand", [last, batch], {}, (B,), torch.int32), total
    return subject.shared[key]


def positions(writer: Writer, subject: Subject, out: fx.Node) -> fx.Node:
    """0, 1, ... for each row: (B, N)."""
    B, _, N, _ = out.meta["val"].shape
    key = ("positions", expression(B), expression(N))
    if key not in subject.shared:
        row = writer.call(aten.arange.default, N)
        subject.shared[key] = writer.call(aten.expand.default, writer.call(aten.unsqueeze.default, row, 0), [B, N])
    return subject.shared[key]


def one_size(writer: Writer, size: int | torch.SymInt, source: fx.Node) -> fx.Node:
    """A size as a tensor of one number."""
    if not isinstance(size, int):
        for node in (*writer.program.placeholders, source):
            held = node.meta.get("val")
            for axis, other in enumerate(held.shape if isinstance(held, torch.Tensor) else ()):
                if same(size, other):
                    attributes = {"start": axis, "end": axis + 1}
                    return writer.shaped("Shape", [node], attributes, (1,), torch.int64)
    return writer.call(aten.reshape.default, writer.call(aten.scalar_tensor.default, size, dtype=torch.int64), [1])
