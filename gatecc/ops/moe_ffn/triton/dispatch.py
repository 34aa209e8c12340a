"""GPU kernels of ``gatecc::moe_ffn``: which calls they take, and why they decline the others."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.notice import say_once
from gatecc.ops.moe_ffn import kernels
from gatecc.ops.moe_ffn.arguments import Arguments
from gatecc.ops.moe_ffn.segments import Gradients

TYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability: before it there is no TF32
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
    return _missing(a.x.device)


@cache
def _missing(device: torch.device) -> str | None:
    """What the machine lacks."""
    found = _launch()
    if isinstance(found, str):
        return found
    if device.type != "cuda" or torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= OLDEST else f"{torch.cuda.get_device_name(device)} is older than the kernels ask for"


@cache
def _launch() -> ModuleType | str:
    """The kernels, or why there are none. Triton takes a second to import, so it waits for a tensor on a GPU."""
    try:
        return import_module("gatecc.ops.moe_ffn.triton.launch")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"


def _run(a: Arguments, name: str, *given: Any, **options: Any) -> Any:
    reason = refusal(a)
    launch = _launch()
    if reason is None and not isinstance(launch, str):
        return getattr(launch, name)(*given, **options)
    if a.x.dtype != torch.float64 and a.indices.numel():  # float64 is for checking, and runs in ATen on every device
        say_once(f"experts run in ATen and not by a GPU kernel: {reason}")
    return None


kernels.register("cuda", GpuKernels())
