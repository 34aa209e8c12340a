"""What ``gatecc::moe_ffn`` costs: floating-point operations for torch's counter, and bytes.

Shapes do not show which slots are empty: from shapes alone, every slot counts as filled. A run counts the filled ones
(`served`). An expert is read once, and no more of them than there are slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gatecc.ops.paths import Taken

Shape = Sequence[int]


def forward(
    x: Shape, weights: Shape, indices: Shape, gate_up: Shape, down: Shape, *_: Any, slots: int | None = None, **__: Any
) -> int:
    """FLOPs: both products of each slot, two operations per multiply-add."""
    slots = indices[0] * indices[1] if slots is None else slots
    return 2 * slots * (gate_up[1] * gate_up[2] + down[1] * down[2])


def backward(
    grad: Shape,
    hidden: Shape,
    *rest: Any,
    needs: Sequence[bool] = (True,) * 6,
    slots: int | None = None,
    **_: Any,
) -> int:
    """Gradients of rows pass through down always, through gate_up for x; each weight has one product of its own."""
    indices, gate_up, down = rest[2:5]
    first, second = gate_up[1] * gate_up[2], down[1] * down[2]
    per_slot = second * (1 + needs[3]) + first * (needs[0] + needs[2])
    return 2 * (indices[0] * indices[1] if slots is None else slots) * per_slot


def served(
    x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, *biases: Tensor | None, **_: Any
) -> tuple[tuple[Tensor, ...], int, int]:
    """The experts' weights, the slots that hold an expert, and how many there are if every token takes every expert."""
    experts = tuple(t for t in (gate_up, down, *biases) if t is not None)
    slots = int((indices < gate_up.size(0)).sum()) if _is_known(indices) else indices.numel()
    return experts, slots, indices.size(0) * gate_up.size(0)


def served_backward(grad: Tensor, hidden: Tensor, *rest: Any, **_: Any) -> tuple[tuple[Tensor, ...], int, int]:
    """The same of the operator's gradient."""
    return served(*rest)


def taken(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *biases: Tensor | None,
    out: Tensor,
    **_: Any,
) -> Taken | None:
    """How many slots each expert has, of as many as there are tokens."""
    if not _is_known(indices):
        return None
    E = gate_up.size(0)
    counts = indices.flatten().bincount(minlength=E + 1)[:E]
    return Taken("expert", counts.tolist(), indices.size(0), (gate_up, down))


def moved_bytes(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *biases: Tensor | None,
    slots: int | None = None,
    **options: Any,
) -> int:
    """Bytes of one call: x, weights, indices and the result once, and the experts that are read: those in the indices
    where they are known, else those that so many slots can reach."""
    E = gate_up.size(0)
    slots = indices.numel() if slots is None else slots
    if _is_known(indices):
        slots = int((indices.unique() < E).sum())
    experts = sum(_size(t) for t in (gate_up, down, *biases) if t is not None)
    out = x.size(0) * down.size(1) * (indices.size(1) if options.get("combine") == "slots" else 1)
    return sum(map(_size, (x, weights, indices))) + out * x.element_size() + experts * min(E, slots) // max(E, 1)


def _is_known(indices: Tensor) -> bool:
    return indices.device.type != "meta" and not isinstance(indices, FakeTensor)


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()
