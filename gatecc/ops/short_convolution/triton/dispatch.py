"""GPU kernels of ``gatecc::short_convolution``: which calls they take, and why they decline the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.triton.launcher import Launcher
from gatecc.ops.short_convolution import kernels
from gatecc.ops.short_convolution.arguments import DTYPES, TAPS, Arguments
from gatecc.ops.short_convolution.kernels import Gradients

LAUNCHER = Launcher("gatecc.ops.short_convolution.triton.launch", "short convolutions run")


class GpuKernels:
    """Serves float32, bfloat16 and float16 on a GPU."""

    def forward(self, a: Arguments) -> tuple[Tensor, Tensor] | None:
        """See gatecc.ops.short_convolution.kernels.Kernels."""
        return _run(a, "forward", a)

    def backward(self, a: Arguments, grad: Tensor, needs: list[bool]) -> Gradients | None:
        """See gatecc.ops.short_convolution.kernels.Kernels."""
        return _run(a, "backward", a, grad, needs)


def refusal(a: Arguments) -> str | None:
    """Why the kernels do not take a call; None if they do."""
    if a.x.dtype not in DTYPES["cuda"]:
        return f"{a.x.dtype} has no kernel"
    if a.taps not in TAPS:
        return f"a convolution of {a.taps} taps has no kernel ({TAPS[0]} to {TAPS[-1]})"
    if not a.x.numel():
        return "a call without a number has no kernel"
    return LAUNCHER.missing(a.x.device)


def _run(a: Arguments, name: str, *given: Any) -> Any:
    quiet = a.x.dtype == torch.float64 or not a.x.numel()  # float64 is for checking, in ATen on every device
    return LAUNCHER.run(name, refusal(a), *given, quiet=quiet)


kernels.register("cuda", GpuKernels())
