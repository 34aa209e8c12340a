"""``gatecc::short_convolution`` in ATen: the definition, every derivative of it, and what runs without a kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.ops.short_convolution.arguments import Arguments, padded, read


def convolve(a: Arguments) -> tuple[Tensor, Tensor]:
    """y: (B, N, C) and the last K - 1 inputs, both contiguous and new."""
    N = a.x.size(1)
    inputs = torch.cat([a.x.new_zeros(a.state_shape) if a.state is None else a.state, a.x], 1)
    last = inputs[:, N:].clone(memory_format=torch.contiguous_format)
    if N == 0:  # conv1d asks for a token
        return torch.zeros_like(a.x, memory_format=torch.contiguous_format), last
    y = F.conv1d(inputs.transpose(1, 2), a.weight, a.bias, groups=a.weight.size(0)).transpose(1, 2)
    return (F.silu(y) if a.activation == "silu" else y).contiguous(), last


def forward(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The arguments and the results are the operator's."""
    return convolve(read(tensors, options))


def gradients(
    grad: Tensor, grad_after: Tensor | None, *tensors: Tensor | None, needs: list[bool], **options: Any
) -> tuple[Tensor, ...]:
    """Gradients of the four tensors, an empty one where none is needed, by autograd through ``forward``."""
    full = padded(tensors)
    at = [i for i, need in enumerate(needs) if need and full[i] is not None]

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        known = dict(zip(at, leaves, strict=True))
        return forward(*(known.get(i, x) for i, x in enumerate(full)), **options)

    (_, last), pull = torch.func.vjp(function, *(x for i, x in enumerate(full) if i in at))[:2]
    given = torch.zeros_like(last) if grad_after is None else grad_after
    found = dict(zip(at, pull((grad, given)), strict=True))
    return tuple(found[i] if i in found else grad.new_empty(0) for i in range(len(full)))


def second(
    cotangents: tuple[Tensor, ...],
    grads: tuple[Tensor, Tensor | None],
    tensors: tuple[Tensor | None, ...],
    needs: list[bool],
    options: dict[str, Any],
) -> tuple[Tensor | None, ...]:
    """Gradients of (grad, grad_after, *tensors), given those of ``gradients``. None for what has none."""
    given = (*grads, *tensors)
    at = [i for i, x in enumerate(given) if x is not None]
    wanted = [i for i, need in enumerate(needs) if need]

    def first(*leaves: Tensor) -> tuple[Tensor, ...]:
        known = dict(zip(at, leaves, strict=True))
        grad, grad_after, *rest = (known.get(i) for i in range(len(given)))
        assert grad is not None
        found = gradients(grad, grad_after, *rest, needs=needs, **options)
        return tuple(found[i] for i in wanted)

    pull = torch.func.vjp(first, *(x for x in given if x is not None))[1]
    found = dict(zip(at, pull(tuple(cotangents[i] for i in wanted)), strict=True))
    return tuple(found.get(i) for i in range(len(given)))
