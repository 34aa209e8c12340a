"""Packed rows in ONNX: a running maximum, which ONNX lacks, and masks whose form ONNX cannot assert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from gatecc.errors import ExportError

_ASSERTED = torch.ops.gatecc.sequences.default
RUNNING: Any = torch.ops.aten.cummax.default


def check_sequences(program: ExportedProgram) -> None:
    """Raise ExportError for a mask whose form must be asserted on each call."""
    if any(node.target is _ASSERTED for node in program.graph.nodes):
        raise ExportError(
            "a rewritten layer asserts the form of a mask that the graph is given, which ONNX cannot",
            found="an attention mask that is an input of the graph",
            expected="a mask that the model makes itself: of lengths, of a 2-D padding mask, of position_ids",
            do="export with example inputs of that kind",
        )


def running_maximum(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``torch.cummax``: the largest value up to each place, and where it is; of equal ones the last."""
    moved = x.movedim(dim, -1)
    at = torch.arange(moved.size(-1), device=x.device)
    least = torch.iinfo(x.dtype).min if not x.dtype.is_floating_point else -torch.inf
    values = torch.where(at <= at[:, None], moved.unsqueeze(-2), least).amax(-1)
    places = torch.where((at <= at[:, None]) & (moved.unsqueeze(-2) == values.unsqueeze(-1)), at, -1).amax(-1)
    return values.movedim(-1, dim), places.movedim(-1, dim)
