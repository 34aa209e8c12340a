"""What ONNX knows of sequences: that it cannot assert the form of a mask."""

from __future__ import annotations

import torch
from torch import fx

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.codegen.onnx.place import place
from gatecc.errors import ExportError
from gatecc.ops.registry import Operator, register


def _check(node: fx.Node) -> None:
    """Raise ExportError: the form of the mask must be asserted on each call."""
    raise ExportError(
        "a rewritten layer asserts the form of a mask that the graph is given, which ONNX cannot",
        where=place(node),
        found="an attention mask that is an input of the graph",
        expected="a mask that the model makes itself: of lengths, of a 2-D padding mask, of position_ids",
        do="export with example inputs of that kind",
    )


register(Operator(overload=torch.ops.gatecc.sequences.default, onnx={"portable": Lowering(None, _check)}))
