"""The table of kernels of ``gatecc::attention``: one entry per device type, which the device's own package fills.

A kernel may decline a call (None): it was not built for these dtypes, or there is no compiler. Then the ATen form runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gatecc.ops.attention import reference
from gatecc.ops.attention.arguments import Arguments

Gradients = tuple[Tensor | None, ...]
"""Of (q, k, v, gate, bias, sinks), in their shapes and in any floating-point dtype; None where none is needed."""


class Kernels(Protocol):
    """What a device does itself."""

    def forward(self, a: Arguments) -> tuple[Tensor, Tensor] | None:
        """The result, in the form of ``a.new_output()``, and ``a.new_logsumexp()`` filled. A query that sees no key
        and has no sink yields zeros, and -inf."""
        ...

    def backward(
        self,
        a: Arguments,
        out: Tensor,
        logsumexp: Tensor,
        grad: Tensor,
        grad_logsumexp: Tensor | None,
        needs: Sequence[bool],
    ) -> Gradients | None:
        """Gradients, given what ``forward`` gave (``out`` is gated) and the gradients of both."""
        ...


KERNELS: dict[str, Kernels] = {}


def register(device: str, kernels: Kernels) -> None:
    """Let ``kernels`` serve a device type, "cpu" or "cuda"."""
    KERNELS[device] = kernels


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """By the device's kernel, or in ATen."""
    kernels = KERNELS.get(a.q.device.type)
    found = None if kernels is None else kernels.forward(a)
    return reference.attention(a) if found is None else found


def backward(
    a: Arguments, out: Tensor, logsumexp: Tensor, grad: Tensor, grad_logsumexp: Tensor | None, needs: Sequence[bool]
) -> Gradients:
    """By the device's kernel, or by autograd through the ATen form."""
    kernels = KERNELS.get(a.q.device.type)
    found = None if kernels is None else kernels.backward(a, out, logsumexp, grad, grad_logsumexp, needs)
    return differentiate(a, grad, grad_logsumexp, needs) if found is None else found


def differentiate(a: Arguments, grad: Tensor, grad_logsumexp: Tensor | None, needs: Sequence[bool]) -> Gradients:
    """The gradients by autograd through the ATen form."""
    at = [i for i, need in enumerate(needs) if need]

    def forward(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        varied: dict[str, Any] = {a._fields[i]: x for i, x in zip(at, leaves, strict=True)}
        return reference.attention(a._replace(**varied))

    (_, logsumexp), pull = torch.func.vjp(forward, *(x for i, x in enumerate(a.tensors) if i in at))[:2]
    given = torch.zeros_like(logsumexp) if grad_logsumexp is None else grad_logsumexp
    found = dict(zip(at, pull((grad, given)), strict=True))
    return tuple(found.get(i) for i in range(len(a.tensors)))
