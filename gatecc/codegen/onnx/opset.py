"""Opset 27: the standard has linear attention and causal convolutions of its own there.

torch.onnx writes invalid files from opset 26 on. A graph is therefore written at 24, with nodes that stand for those
operators, and raised: what changed on the way took more types or attributes, and says what it said before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gatecc.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

RAISED = 27
WRITTEN = 24  # by torch.onnx, where the file is to be of RAISED
FREELY_LOADED = 26  # the newest that every ONNX Runtime since 1.31 loads without a flag
_STANDS_FOR = "gatecc.opset27"
LINEAR_ATTENTION = f"{_STANDS_FOR}::LinearAttention"
CAUSAL_CONVOLUTION = f"{_STANDS_FOR}::CausalConvWithState"


def written_at(opset: int) -> int:
    """The opset that torch.onnx is asked for."""
    return WRITTEN if opset > WRITTEN + 1 else opset


def raise_opset(model: ir.Model, opset: int) -> None:
    """Make a model that torch.onnx wrote one of ``opset``. Raises ExportError if it is of another one."""
    asked, found = written_at(opset), model.opset_imports.get("")
    if found != asked:
        raise ExportError(
            "torch.onnx wrote another opset than it was asked for",
            found=f"opset {found}",
            expected=f"opset {asked}",
            do="use opset=24",
        )
    model.opset_imports[""] = opset
    for node in model.graph.all_nodes():
        if node.domain == _STANDS_FOR:
            node.domain, node.version = "", opset
    model.opset_imports.pop(_STANDS_FOR, None)
