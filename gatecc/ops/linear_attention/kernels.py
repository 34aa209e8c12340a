"""The table of kernels of linear attention: one entry per device type, filled in by gatecc.codegen.

A kernel is given a ``Problem`` and may decline it (None): it was not built for these dtypes, or there is no compiler.
Then the ATen form runs. Operators stand below code generation, so this file knows no kernel by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gatecc.ops.linear_attention.chunk import chunked
from gatecc.ops.linear_attention.problem import Body, Gradients, Problem
from gatecc.ops.linear_attention.reference import token_by_token

# (q, k, v, log_decay, beta, state, scale, normalizer) -> (o, the state after the token); None if it is declined. With a
# normalizer log_decay holds logits, as in a Problem.
Step = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor, float | None, float | None],
    tuple[Tensor, Tensor] | None,
]


class Kernels(Protocol):
    """What a device does itself."""

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor] | None:
        """o: (B, H, N, E), in any dtype, and the final state, (S, H, Dk, E), a tensor of its own."""
        ...

    def backward(self, problem: Problem, grad_o: Tensor, grad_state: Tensor) -> Gradients | None:
        """Gradients in the shapes of the problem's tensors, in any dtype. grad_state is contiguous."""
        ...

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
        """One token, q: (B, H, Dk), k: (B, Hk, Dk), v: (B, Hv, Dv), or with a third axis of 1 each, as the result then
        has. The state after it is written to ``after``, which may be ``state``.

        May be declined unless every tensor has H heads, the state's dtype and is contiguous.
        """
        ...

    def one_token(self) -> Step | None:
        """A step for one place in a program, where operands of the same shapes come again and again; None if there is
        nothing to be gained. Each operand has an axis of 1 for the token: q (B, H, 1, Dk), beta (B, Hb, 1). The state
        that it is given stays as it is."""
        ...


KERNELS: dict[str, Kernels] = {}


def register(device: str, kernels: Kernels) -> None:
    """Let ``kernels`` serve a device type, "cpu" or "cuda"."""
    KERNELS[device] = kernels


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """o and the final state, by the device's kernel or in ATen."""
    kernels = KERNELS.get(problem.q.device.type)
    found = kernels.forward(problem) if kernels else None
    if found is not None:
        return found
    o, state = problem.run(form(problem))
    return o, state.clone() if state is problem.state else state


def backward(problem: Problem, grad_o: Tensor, grad_state: Tensor) -> Gradients:
    """Gradients of the problem's tensors, by the device's kernel or in ATen."""
    kernels = KERNELS.get(problem.q.device.type)
    found = kernels.backward(problem, grad_o, grad_state.contiguous()) if kernels else None
    return problem.differentiate(form(problem), grad_o, grad_state) if found is None else found


def form(problem: Problem) -> Body:
    """The recurrence in ATen. float64 is for checking: it runs the plain recurrence."""
    return token_by_token if problem.state_dtype == torch.float64 else chunked
