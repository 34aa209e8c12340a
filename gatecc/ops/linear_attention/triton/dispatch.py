"""GPU kernels of ``gatecc::linear_attention``: which problems they take, and why they decline the others."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.notice import say_once
from gatecc.ops.linear_attention import kernels
from gatecc.ops.linear_attention.problem import Gradients, Problem

TYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 256  # key channels under the delta rules, where a program holds all of them
OLDEST = (8, 0)  # compute capability: before it there is no TF32


class GpuKernels:
    """Serves float32, bfloat16 and float16 on a GPU: every rule and option of the operator."""

    activates = True

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor] | None:
        """See gatecc.ops.linear_attention.kernels.Kernels."""
        return _run(problem, "forward", problem)

    def backward(self, problem: Problem, grad_o: Tensor, grad_state: Tensor) -> Gradients | None:
        """See gatecc.ops.linear_attention.kernels.Kernels."""
        return _run(problem, "backward", problem, grad_o, grad_state)

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor,
        scale: float,
    ) -> Tensor | None:
        """One token is a handful of pointwise operations: the ATen form serves."""
        return None


def refusal(problem: Problem) -> str | None:
    """Why the kernels do not take a problem; None if they do."""
    Dk, Dv = problem.q.size(3), problem.v.size(3)
    if problem.q.dtype not in TYPES:
        return f"{problem.q.dtype} has no kernel"
    if not Dk or not Dv:
        return "heads without channels have no kernel"
    if problem.beta is not None and Dk > LARGEST:
        return f"a delta rule with {Dk} key channels has no kernel ({LARGEST} at most)"
    return _missing(problem.q.device)


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
        return import_module("gatecc.ops.linear_attention.triton.launch")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"


def _run(problem: Problem, name: str, *given: Any) -> Any:
    reason = refusal(problem)
    launch = _launch()
    if reason is None and not isinstance(launch, str):
        return getattr(launch, name)(*given)
    if problem.q.dtype != torch.float64:  # float64 is for checking, and runs the recurrence on every device
        say_once(f"linear attention runs in ATen and not by a GPU kernel: {reason}")
    return None


kernels.register("cuda", GpuKernels())
