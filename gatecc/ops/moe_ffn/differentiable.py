"""``gatecc::moe_ffn`` with shapes that depend on no value: every expert on every token, then the slots' own.

What every derivative, of any order and mode, can be taken of, and what torch.func maps. It costs E / k times the
operator, so kernels serve the forward pass and the first derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.ops.moe_ffn.arguments import DIFFERENTIABLE, TENSORS, read
from gatecc.ops.moe_ffn.segments import in_order


def forward(*tensors: Tensor | None, **options: Any) -> Tensor:
    """The arguments and the result are the operator's. An index out of range is read as an empty slot."""
    a = read(tensors, options)
    h = torch.einsum("td,erd->ter", a.x, a.gate_up)
    h = h if a.gate_up_bias is None else h + a.gate_up_bias
    y = torch.einsum("tef,eof->teo", a.activation.hidden(h, a.layout), a.down)
    y = y if a.down_bias is None else y + a.down_bias
    there = (a.indices >= 0) & (a.indices < a.experts)
    indices = torch.where(there, a.indices, 0).unsqueeze(-1).expand(-1, -1, y.size(2))
    chosen = torch.where(there.unsqueeze(-1), torch.gather(y, 1, indices).to(a.wide), 0.0)
    slots = chosen * torch.where(there, a.weights.to(a.wide), 0.0).unsqueeze(-1)
    return (in_order(slots) if a.combine == "sum" else slots).to(a.x.dtype)


def gradients(grad: Tensor, hidden: Tensor, *tensors: Tensor | None, needs: list[bool], **options: Any) -> Any:
    """Gradients of the differentiable tensors, an empty one where none is needed. The arguments are the operator's."""
    del hidden  # it is a function of the others
    full = padded(tensors)
    at = [i for i, need in zip(DIFFERENTIABLE, needs, strict=True) if need and full[i] is not None]
    pull = torch.func.vjp(_forward_of(at, full, options), *(full[i] for i in at))[1]
    found = dict(zip(at, pull(grad), strict=True))
    return tuple(found[i] if i in found else grad.new_empty(0) for i in DIFFERENTIABLE)


def second(
    cotangents: tuple[Tensor, ...],
    grad: Tensor,
    tensors: tuple[Tensor | None, ...],
    needs: list[bool],
    options: dict[str, Any],
) -> tuple[Tensor | None, ...]:
    """Gradients of (grad, *tensors), given those of ``gradients``. None for what has none."""
    full = padded(tensors)
    at = [i for i in DIFFERENTIABLE if full[i] is not None]

    def first(grad: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(_forward_of(at, full, options), *leaves)[1](grad)

    pull = torch.func.vjp(first, grad, *(full[i] for i in at))[1]
    given = dict(zip(DIFFERENTIABLE, zip(cotangents, needs, strict=True), strict=True))
    cotangent = tuple(given[i][0] if given[i][1] else torch.zeros_like(_of(full, i)) for i in at)
    of_grad, *rest = pull(cotangent)
    found = dict(zip(at, rest, strict=True))
    return of_grad, *(found.get(i) for i in range(len(tensors)))


def padded(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """All seven, those that were left out as None."""
    return (*tensors, *[None] * (TENSORS - len(tensors)))


def _of(tensors: tuple[Tensor | None, ...], i: int) -> Tensor:
    found = tensors[i]
    assert found is not None
    return found


def _forward_of(at: list[int], tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> Any:
    """``forward`` as a function of the tensors at ``at``."""

    def function(*leaves: Tensor) -> Tensor:
        known = dict(zip(at, leaves, strict=True))
        return forward(*(known.get(i, x) for i, x in enumerate(tensors)), **options)

    return function
