"""GPU kernels of ``gatecc::moe_ffn``: which calls they take, and why they decline the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.triton.launcher import TYPES, Launcher
from gatecc.ops.moe_ffn import kernels
from gatecc.ops.moe_ffn.arguments import Arguments
from gatecc.ops.moe_ffn.segments import Gradients

LAUNCHER = Launcher("gatecc.ops.moe_ffn.triton.launch", "experts run")
LARGEST = 2**31  # elements of one expert's matrix: places in it are numbers of 32 bits


class GpuKernels:
    """Serves float32, bfloat16 and float16 on a GPU: every activation, layout and combination."""

    def forward(self, a: Arguments, *, keep: bool) -> tuple[Tensor, Tensor | None] | None:
        """See gatecc.ops.moe_ffn.kernels.Kernels."""
        return _run(a, "forward", a, keep=keep)

    def backward(self, a: Arguments, grad: Tensor, hidden: Tensor, needs: list[bool]) -> Gradients | None:
        """See gatecc.ops.moe_ffn.kernels.Kernels."""
        return _run(a, "backward", a, grad, hidden, needs)


def refusal(a: Arguments) -> str | None:
    """Why the kernels do not take a call; None if they do."""
    if a.x.dtype not in TYPES:
        return f"{a.x.dtype} has no kernel"
    if not a.indices.numel() or not a.gate_up.numel() or not a.down.numel():
        return "a call without rows or columns has no kernel"
    span = max(sum((n - 1) * s for n, s in zip(w.shape[1:], w.stride()[1:], strict=True)) for w in (a.gate_up, a.down))
    if span >= LARGEST:
        return f"an expert's matrix of {span} elements has no kernel ({LARGEST} at most)"
    return LAUNCHER.missing(a.x.device)


def _run(a: Arguments, name: str, *given: Any, **options: Any) -> Any:
    quiet = a.x.dtype == torch.float64 or not a.indices.numel()  # float64 is for checking, in ATen on every device
    return LAUNCHER.run(name, refusal(a), *given, quiet=quiet, **options)


kernels.register("cuda", GpuKernels())
