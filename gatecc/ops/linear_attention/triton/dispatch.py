"""GPU kernels of ``gatecc::linear_attention``: which problems they take, and why they decline the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.triton.launcher import TYPES, Launcher
from gatecc.ops.linear_attention import kernels
from gatecc.ops.linear_attention.kernels import Step
from gatecc.ops.linear_attention.problem import Gradients, Problem

LAUNCHER = Launcher("gatecc.ops.linear_attention.triton.launch", "linear attention runs")
STEP = Launcher("gatecc.ops.linear_attention.triton.one_token", "a step of linear attention runs")
LARGEST = 256  # key channels under the delta rules and in a step, where a program holds all of them


class GpuKernels:
    """Serves float32, bfloat16 and float16 on a GPU: every rule and option of the operator."""

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
        """See gatecc.ops.linear_attention.kernels.Kernels."""
        return self._step(q, k, v, log_decay, beta, state, after, scale, None)

    def _step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor,
        after: Tensor,
        scale: float,
        normalizer: float | None,
    ) -> Tensor | None:
        fits = state.dtype == after.dtype == torch.float32 and state.is_contiguous() and after.is_contiguous()
        reason = _missing(q, state.size(2), state.size(3)) or _wide("a step", state.size(2))
        if not fits or q.dtype == torch.float64:  # what the operator brings into shape, or refuses
            return None
        return STEP.run("step", reason, q, k, v, log_decay, beta, state, after, scale, normalizer)

    def one_token(self) -> Step:
        """See gatecc.ops.linear_attention.kernels.Kernels."""

        def one_token(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            log_decay: Tensor | None,
            beta: Tensor | None,
            state: Tensor,
            scale: float | None = None,
            normalizer: float | None = None,
        ) -> tuple[Tensor, Tensor] | None:
            after = torch.empty_like(state)
            factor = q.size(-1) ** -0.5 if scale is None else scale
            o = self._step(q, k, v, log_decay, beta, state, after, factor, normalizer)
            return None if o is None else (o, after)

        return one_token


def refusal(problem: Problem) -> str | None:
    """Why the kernels do not take a problem; None if they do."""
    Dk, Dv = problem.q.size(3), problem.v.size(3)
    return _missing(problem.q, Dk, Dv) or (None if problem.beta is None else _wide("a delta rule", Dk))


def _missing(q: Tensor, Dk: int, Dv: int) -> str | None:
    if q.dtype not in TYPES:
        return f"{q.dtype} has no kernel"
    if not Dk or not Dv:
        return "heads without channels have no kernel"
    return LAUNCHER.missing(q.device)


def _wide(what: str, Dk: int) -> str | None:
    return f"{what} with {Dk} key channels has no kernel ({LARGEST} at most)" if Dk > LARGEST else None


def _run(problem: Problem, name: str, *given: Any) -> Any:
    # float64 is for checking, and runs the recurrence on every device.
    return LAUNCHER.run(name, refusal(problem), *given, quiet=problem.q.dtype == torch.float64)


kernels.register("cuda", GpuKernels())
