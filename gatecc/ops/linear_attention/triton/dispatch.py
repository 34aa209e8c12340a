"""GPU kernels of ``gatecc::linear_attention``: which problems they take, and why they decline the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.triton.launcher import TYPES, Launcher
from gatecc.ops.linear_attention import kernels
from gatecc.ops.linear_attention.problem import Gradients, Problem

LAUNCHER = Launcher("gatecc.ops.linear_attention.triton.launch", "linear attention runs")
LARGEST = 256  # key channels under the delta rules, where a program holds all of them


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
        after: Tensor,
        scale: float,
    ) -> Tensor | None:
        """One token is a handful of pointwise operations: the ATen form serves."""
        return None

    def one_token(self) -> None:
        """Likewise."""


def refusal(problem: Problem) -> str | None:
    """Why the kernels do not take a problem; None if they do."""
    Dk, Dv = problem.q.size(3), problem.v.size(3)
    if problem.q.dtype not in TYPES:
        return f"{problem.q.dtype} has no kernel"
    if not Dk or not Dv:
        return "heads without channels have no kernel"
    if problem.beta is not None and Dk > LARGEST:
        return f"a delta rule with {Dk} key channels has no kernel ({LARGEST} at most)"
    return LAUNCHER.missing(problem.q.device)


def _run(problem: Problem, name: str, *given: Any) -> Any:
    # float64 is for checking, and runs the recurrence on every device.
    return LAUNCHER.run(name, refusal(problem), *given, quiet=problem.q.dtype == torch.float64)


kernels.register("cuda", GpuKernels())
