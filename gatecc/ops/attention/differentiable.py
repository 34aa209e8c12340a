"""``gatecc::attention`` in ATen alone: what every derivative, of any order and mode, can be taken of, and torch.func.

Kernels serve the forward pass and the first derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.ops.attention import reference
from gatecc.ops.attention.arguments import TENSORS, padded, read
from gatecc.ops.attention.kernels import differentiate


def forward(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The arguments and the results are the operator's."""
    return reference.attention(read(tensors, options))


def gradients(
    grad: Tensor,
    grad_logsumexp: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    *tensors: Tensor | None,
    needs: list[bool],
    **options: Any,
) -> tuple[Tensor, ...]:
    """Gradients of the six tensors, an empty one where none is needed."""
    del out, logsumexp  # they are functions of the others
    found = differentiate(read(tensors, options), grad, grad_logsumexp, needs)
    return tuple(grad.new_empty(0) if g is None else g for g in found)


def second(
    cotangents: tuple[Tensor, ...],
    grad: Tensor,
    grad_logsumexp: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    needs: list[bool],
    options: dict[str, Any],
) -> tuple[Tensor | None, ...]:
    """Gradients of (grad, grad_logsumexp, *tensors), given those of ``gradients``. None for what has none."""
    full = padded(tensors)
    at = [i for i, x in enumerate(full) if x is not None and x.is_floating_point()]
    wanted = [i for i in range(TENSORS) if needs[i]]
    grads = [grad] if grad_logsumexp is None else [grad, grad_logsumexp]

    def first(*leaves: Tensor) -> tuple[Tensor, ...]:
        known = dict(zip(at, leaves[len(grads) :], strict=True))
        a = read([known.get(i, x) for i, x in enumerate(full)], options)
        of_logsumexp = None if grad_logsumexp is None else leaves[1]
        found = differentiate(a, leaves[0], of_logsumexp, needs)
        return tuple(g for g in found if g is not None)

    pull = torch.func.vjp(first, *grads, *(x for i, x in enumerate(full) if i in at))[1]
    of_grad, *rest = pull(tuple(cotangents[i] for i in wanted))
    of_logsumexp = None if grad_logsumexp is None else rest.pop(0)
    found = dict(zip(at, rest, strict=True))
    return of_grad, of_logsumexp, *(found.get(i) for i in range(len(tensors)))
