"""``gatecc::linear_attention`` in ATen alone: what every derivative, of any order and mode, can be taken of.

Kernels serve the forward pass and the first derivatives. Higher derivatives, forward mode and torch.func go through
here; they cost what a chunked form in ATen costs, in time and in what autograd keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.ops.linear_attention.arguments import read
from gatecc.ops.linear_attention.kernels import form
from gatecc.ops.linear_attention.problem import finish, prepare

DIFFERENTIABLE = 6  # of the operator's tensors: q, k, v, log_decay, beta, initial_state


def forward(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """o and the final state. The arguments are the operator's."""
    a = read(tensors, options)
    problem = prepare(a)
    o, state = problem.run(form(problem))
    return finish(a, o), state


def gradients(grad_o: Tensor, grad_state: Tensor, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    """Gradients of the first six tensors, an empty one where none was given. The arguments are the operator's."""
    given = [i for i, x in enumerate(tensors[:DIFFERENTIABLE]) if x is not None]
    pull = torch.func.vjp(_forward_of(given, tensors, options), *(tensors[i] for i in given))[1]
    found = dict(zip(given, pull((grad_o, grad_state)), strict=True))
    return tuple(found[i] if i in found else grad_o.new_empty(0) for i in range(DIFFERENTIABLE))


def second(
    cotangents: tuple[Tensor, ...],
    grad_o: Tensor,
    grad_state: Tensor,
    tensors: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> tuple[Tensor | None, ...]:
    """Gradients of (grad_o, grad_state, *tensors), given those of ``gradients``. None for what has none."""
    given = [i for i, x in enumerate(tensors[:DIFFERENTIABLE]) if x is not None]

    def first(grad_o: Tensor, grad_state: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(_forward_of(given, tensors, options), *leaves)[1]((grad_o, grad_state))

    pull = torch.func.vjp(first, grad_o, grad_state, *(tensors[i] for i in given))[1]
    of_o, of_state, *rest = pull(tuple(cotangents[i] for i in given))
    found = dict(zip(given, rest, strict=True))
    return of_o, of_state, *(found.get(i) for i in range(len(tensors)))


def _forward_of(given: list[int], tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> Any:
    """``forward`` as a function of the tensors at ``given``."""

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        known = dict(zip(given, leaves, strict=True))
        return forward(*(known.get(i, x) for i, x in enumerate(tensors)), **options)

    return function
