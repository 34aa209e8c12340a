"""Settled: sizes that the graph has as numbers, though the model runs at others: a loop over tokens was unrolled."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gatecc.codegen.onnx.build import Graph
from gatecc.codegen.onnx.leaves import Call

_MORE = 3


def settled(call: Call, graph: Graph) -> list[str]:
    """A note for each of these sizes. The model is run once for each number above 1 among the sizes of its inputs."""
    shapes = list(graph.shapes(graph.model.graph.inputs).values())
    numbers = dict.fromkeys(size for shape in shapes for size in shape if isinstance(size, int) and size > 1)
    notes: list[str] = []
    for number in numbers:
        leaves = [
            _longer(x, [axis for axis, size in enumerate(shape) if size == number])
            for x, shape in zip(call.leaves, shapes, strict=True)
        ]
        if not _runs(call, leaves):
            continue
        named = [name for name, shape in zip(call.inputs, shapes, strict=True) if number in shape]
        notes.append(
            f"the size {number} of {', '.join(named)} is fixed, though the model runs at others: a loop over it in "
            "Python is unrolled (torch._higher_order_ops.scan is not), and heads and channels of linear attention are "
            "numbers in their node"
        )
    return notes


def _runs(call: Call, leaves: Sequence[torch.Tensor]) -> bool:
    try:
        call.flat(*leaves)
    except Exception:  # of the model's own code
        return False
    return True


def _longer(x: torch.Tensor, axes: list[int]) -> torch.Tensor:
    """The tensor with its entries repeated along axes."""
    for axis in axes:
        x = x.index_select(axis, torch.arange(x.size(axis) + _MORE, device=x.device) % x.size(axis))
    return x
