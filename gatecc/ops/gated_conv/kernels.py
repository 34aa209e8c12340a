"""The table of kernels of ``gatecc::gated_conv``: one entry per device type. What it declines runs in ATen."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gatecc.ops.gated_conv import compact
from gatecc.ops.gated_conv.arguments import Arguments, masked


class Kernels(Protocol):
    """What a device does itself: each sample its own channels."""

    def fits(self, a: Arguments) -> bool:
        """Whether it computes such a call."""
        ...

    def forward(self, a: Arguments) -> Tensor | None:
        """(B, Cout, *space), contiguous; None without memory."""
        ...


KERNELS: dict[str, Kernels] = {}


def register(device: str, kernels: Kernels) -> None:
    """Let ``kernels`` serve a device type, "cpu" or "cuda"."""
    KERNELS[device] = kernels


def forward(a: Arguments) -> Tensor:
    """By the device's kernel, or in ATen; all channels, where all are on, by torch's convolution."""
    if a.x.device.type != "cpu":  # reading a mask would wait for the device
        return masked(*a[:5], **a.options).contiguous()
    if _is_whole(a):
        return masked(*a[:5], **a.options).contiguous()
    kernels = KERNELS.get(a.x.device.type)
    found = kernels.forward(a) if kernels is not None and kernels.fits(a) else None
    return compact.forward(a) if found is None else found


def served(a: Arguments) -> tuple[int, int]:
    """How many pairs of channels a call multiplies, over all samples, and how many there are."""
    every = a.x.size(0) * a.pairs
    kernels = KERNELS.get(a.x.device.type)
    if a.x.device.type != "cpu" or _is_whole(a):
        return every, every
    parts = compact.apart(a) if kernels is not None and kernels.fits(a) else compact.parts(a)
    return sum(part.pairs(a) for part in parts), every


def _is_whole(a: Arguments) -> bool:
    return bool(a.gate.all()) and (a.inputs is None or a.depthwise or bool(a.inputs.all()))
