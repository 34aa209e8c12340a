"""The table of kernels of ``gatecc::short_convolution``: one entry per device type, which the device's package fills.

A kernel may decline a call (None): it was not built for these dtypes or taps, or there is no compiler. Then the ATen
form runs.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gatecc.ops.short_convolution import reference
from gatecc.ops.short_convolution.arguments import Arguments

Gradients = tuple[Tensor | None, ...]
"""Of (x, weight, bias, state), in their shapes and dtypes, contiguous; None where none is needed."""


class Kernels(Protocol):
    """What a device does itself."""

    def forward(self, a: Arguments) -> tuple[Tensor, Tensor] | None:
        """y and the last inputs, both contiguous and new."""
        ...

    def backward(self, a: Arguments, grad: Tensor, needs: list[bool]) -> Gradients | None:
        """Gradients, given that of y."""
        ...


KERNELS: dict[str, Kernels] = {}


def register(device: str, kernels: Kernels) -> None:
    """Let ``kernels`` serve a device type, "cpu" or "cuda"."""
    KERNELS[device] = kernels


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """By the device's kernel, or in ATen."""
    kernels = KERNELS.get(a.x.device.type)
    found = None if kernels is None else kernels.forward(a)
    return reference.convolve(a) if found is None else found


def backward(a: Arguments, grad: Tensor, grad_after: Tensor | None, needs: list[bool]) -> Gradients:
    """By the device's kernel, or by autograd through the ATen form."""
    kernels = KERNELS.get(a.x.device.type)
    found = None if kernels is None else kernels.backward(a, grad, needs)
    if found is None:
        given = reference.gradients(grad, grad_after, *a.tensors, needs=needs, activation=a.activation)
        return tuple(g.contiguous() if need else None for g, need in zip(given, needs, strict=True))
    if grad_after is not None:
        _add(found, grad_after, a.x.size(1))
    return found


def _add(found: Gradients, grad_after: Tensor, tokens: int) -> None:
    """Add the gradient of the last inputs: those of x, and where x is shorter those of the state before it."""
    dx, _, _, dstate = found
    of_state = max(0, grad_after.size(1) - tokens)
    if dx is not None:
        dx[:, tokens - (grad_after.size(1) - of_state) :] += grad_after[:, of_state:]
    if dstate is not None and of_state:
        dstate[:, tokens:] += grad_after[:, :of_state]
