"""``gatecc::recurrent``: a GRU or LSTM over a sequence as one operator, so that captured graphs keep any length.

``aten.gru`` and ``aten.lstm`` are unrolled while a graph is traced, which fixes the length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.errors import ArgumentError


@torch.library.custom_op("gatecc::recurrent", mutates_args=())
def recurrent(x: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor, cell: str) -> Tensor:
    """x: (B, N, C) -> hidden states (B, N, H), from state zero.

    w_in: (3H or 4H, C), w_state: (3H or 4H, H) and biases as in torch.nn.GRU ("gru") and torch.nn.LSTM ("lstm").
    """
    return _run(x, (w_in, w_state, b_in, b_state), cell).contiguous()


@recurrent.register_fake
def _(x: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor, cell: str) -> Tensor:
    return x.new_empty(x.size(0), x.size(1), w_state.size(1))


@torch.library.custom_op("gatecc::recurrent_backward", mutates_args=())
def recurrent_backward(
    grad: Tensor, x: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor, cell: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the four weights; the forward pass is run again rather than kept."""
    # Inside an operator autograd is off; torch.func brings its own.
    pull = torch.func.vjp(lambda *leaves: _run(leaves[0], leaves[1:], cell), x, w_in, w_state, b_in, b_state)[1]
    gx, gw, gs, gb, gt = (g.contiguous() for g in pull(grad))
    return gx, gw, gs, gb, gt.clone()


@recurrent_backward.register_fake
def _(
    grad: Tensor, x: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor, cell: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gx, gw, gs, gb, gt = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w_in, w_state, b_in, b_state)
    )
    return gx, gw, gs, gb, gt


def _run(x: Tensor, weights: tuple[Tensor, ...], cell: str) -> Tensor:
    if cell not in ("gru", "lstm"):
        raise ArgumentError("no such cell", found=cell, expected="gru, lstm")
    zero = x.new_zeros(1, x.size(0), weights[1].size(1))
    if cell == "gru":
        return torch.gru(x, zero, list(weights), True, 1, 0.0, False, False, True)[0]
    return torch.lstm(x, (zero, zero), list(weights), True, 1, 0.0, False, False, True)[0]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.cell = inputs[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*recurrent_backward(grad.contiguous(), *ctx.saved_tensors, ctx.cell), None)


recurrent.register_autograd(_backward, setup_context=_setup)
