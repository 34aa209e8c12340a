"""The table of kernels of ``gatecc::moe_ffn``: one entry per device type, which the device's own package fills.

A kernel may decline a call (None): it was not built for these dtypes, or there is no compiler. Then the ATen form runs.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gatecc.ops.moe_ffn import segments
from gatecc.ops.moe_ffn.arguments import Arguments
from gatecc.ops.moe_ffn.segments import Gradients


class Kernels(Protocol):
    """What a device does itself."""

    def forward(self, a: Arguments, *, keep: bool) -> tuple[Tensor, Tensor | None] | None:
        """The result, ``a.output_shape``; and with ``keep`` what ``backward`` wants, ``a.hidden_shape``."""
        ...

    def backward(self, a: Arguments, grad: Tensor, hidden: Tensor, needs: list[bool]) -> Gradients | None:
        """Gradients in the shapes and dtypes of the tensors; ``needs`` as in segments.backward."""
        ...


KERNELS: dict[str, Kernels] = {}


def register(device: str, kernels: Kernels) -> None:
    """Let ``kernels`` serve a device type, "cpu" or "cuda"."""
    KERNELS[device] = kernels


def forward(a: Arguments, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """By the device's kernel, or in ATen."""
    kernels = KERNELS.get(a.x.device.type)
    found = None if kernels is None else kernels.forward(a, keep=keep)
    return segments.forward(a, keep=keep) if found is None else found


def backward(a: Arguments, grad: Tensor, hidden: Tensor, needs: list[bool]) -> Gradients:
    """By the device's kernel, or in ATen."""
    kernels = KERNELS.get(a.x.device.type)
    found = None if kernels is None else kernels.backward(a, grad, hidden, needs)
    return segments.backward(a, grad, hidden, needs) if found is None else found
