"""gelu: GELU, exact or by tanh, in any spelling, with the bias in front of it, is one node.

``BiasGelu`` and ``FastGelu`` of ONNX Runtime take the bias of the product; Gelu of the standard (opset 20) has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject, lacking_kernel, written_in_place
from gatecc.codegen.onnx.lower.write import Writer, aten
from gatecc.ir.match.gelu import GELU, by_tanh
from gatecc.ir.ops import opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.pattern import Match
from gatecc.ir.program import fake


class Gelu(GraphLowering):
    """gelu(x + bias) -> BiasGelu, FastGelu, or Gelu."""

    name = "gelu"
    after = ("copies",)
    since = 20

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        flow = subject.flow()
        for match in GELU.find(flow).matches:
            found = "GELU by tanh" if by_tanh(match) else "GELU"
            if reason := lacking_kernel(match["x"], match.root) or written_in_place(match, flow):
                yield self.left(match.root, found, reason)
                continue
            op, made = self._write(subject, match)
            match.root.replace_all_uses_with(made)
            yield self.done(match.root, found, op)

    def _write(self, subject: Subject, match: Match) -> tuple[str, fx.Node]:
        x, tanh = match["x"], by_tanh(match)
        writer = Writer(subject.program, match.root, self.name)
        own = subject.target == "ort" and match.root.meta["val"].dtype == torch.float32
        if own and (tanh or _biased(match)):
            op, inputs = ("FastGelu" if tanh else "BiasGelu"), [x]
            if _biased(match):
                given: Any = x.args
                inputs = [writer.called(x, aten.linear.default, *given[:2]), given[2]]
            return op, writer.onnx(f"com.microsoft::{op}", inputs, {}, match.root)
        attributes = {"approximate": "tanh" if tanh else "none"}
        return "Gelu", writer.onnx("Gelu", [x], attributes, match.root)


def _biased(match: Match) -> bool:
    """Whether x is a product with a bias, which nobody else reads."""
    x = match["x"]
    held = fake(x)
    alone = all(user in match.inner for user in x.users)
    return opname(x) == "linear" and isinstance(x.args[2], fx.Node) and alone and held is not None and held.dim() > 2


__all__ = ["Gelu"]
