"""tied: a product with a weight that is read as a table too (the head of a language model) leaves the weight as it is.

``FusedMatMul`` of ONNX Runtime takes it turned; with MatMul it would be there twice, or be turned at every load.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject
from gatecc.codegen.onnx.lower.write import Writer, aten
from gatecc.ir.ops import opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.program import fake


class Tied(GraphLowering):
    """linear(x, W), embedding(W, ids) -> FusedMatMul(x, W, transB=1)."""

    name = "tied"
    after = ("attention", "skip-norm", "gelu")
    targets = ("ort",)

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        tables = {subject.program.path(n.args[0]): n for n in subject.program.calls() if _is_table(n)}  # pyright: ignore[reportArgumentType]
        for node in list(subject.program.calls()):
            weight = node.args[1] if opname(node) == "linear" else None
            if not isinstance(weight, fx.Node) or subject.program.path(weight) not in tables:
                continue
            held = fake(node)
            if held is None or held.dtype != torch.float32 or held.dim() < 2:
                continue
            writer = Writer(subject.program, node, self.name)
            made = writer.onnx("com.microsoft::FusedMatMul", [node.args[0], weight], {"transB": 1}, node)  # pyright: ignore[reportArgumentType]
            if isinstance(node.args[2], fx.Node):
                made = writer.call(aten.add.Tensor, made, node.args[2])
            node.replace_all_uses_with(made)
            yield self.done(node, "a product with a table", "FusedMatMul")


def _is_table(node: fx.Node) -> bool:
    return opname(node) == "embedding" and isinstance(node.args[0], fx.Node)


__all__ = ["Tied"]
