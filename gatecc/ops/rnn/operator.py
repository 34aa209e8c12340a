"""``gatecc::rnn``: a GRU or LSTM over a sequence as one operator, so that captured graphs keep any length.

``aten.gru`` and ``aten.lstm`` are unrolled while a graph is traced, which fixes the length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ops.transforms import instead


@torch.library.custom_op("gatecc::rnn", mutates_args=())
def rnn(x: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor, cell: str) -> Tensor:
    """x: (B, N, C) -> hidden states (B, N, H), from state zero.

    w_in: (3H or 4H, C), w_state: (3H or 4H, H) and biases as in torch.nn.GRU ("gru") and torch.nn.LSTM ("lstm").
    """
    return _run(x, (w_in, w_state, b_in, b_state), cell).contiguous()


@rnn.register_fake
def _(x: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor, cell: str) -> Tensor:
    return x.new_empty(x.size(0), x.size(1), w_state.size(1))


@torch.library.custom_op("gatecc::rnn_backward", mutates_args=())
def rnn_backward(
    grad: Tensor, x: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor, cell: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the four weights; the forward pass is run again rather than kept."""
    # Inside an operator autograd is off; torch.func brings its own.
    pull = torch.func.vjp(lambda *leaves: _run(leaves[0], leaves[1:], cell), x, w_in, w_state, b_in, b_state)[1]
    gx, gw, gs, gb, gt = (g.contiguous() for g in pull(grad))
    return gx, gw, gs, gb, gt.clone()


@rnn_backward.register_fake
def _(
    grad: Tensor, x: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor, cell: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gx, gw, gs, gb, gt = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w_in, w_state, b_in, b_state)
    )
    return gx, gw, gs, gb, gt


def _run(x: Tensor, weights: tuple[Tensor, ...], cell: str) -> Tensor:
    _check(cell)
    zero = x.new_zeros(1, x.size(0), weights[1].size(1))
    if cell == "gru":
        return torch.gru(x, zero, list(weights), True, 1, 0.0, False, False, True)[0]
    return torch.lstm(x, (zero, zero), list(weights), True, 1, 0.0, False, False, True)[0]


def _check(cell: str) -> None:
    if cell not in ("gru", "lstm"):
        raise ArgumentError("no such cell", found=cell, expected="gru, lstm")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.cell = inputs[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*rnn_backward(grad.contiguous(), *ctx.saved_tensors, ctx.cell), None)


def _spelled(x: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor, cell: str) -> Tensor:
    """``rnn`` token by token in plain ATen: differentiable to any order, in both modes, and under torch.func.

    torch.gru and torch.lstm have kernels that are differentiable once.
    """
    _check(cell)
    h = c = x.new_zeros(x.size(0), w_state.size(1))
    out: list[Tensor] = []
    for read in (x @ w_in.mT + b_in).unbind(1):
        held = h @ w_state.mT + b_state
        if cell == "gru":
            (r, z, n), (hr, hz, hn) = read.chunk(3, -1), held.chunk(3, -1)
            r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
            n = torch.tanh(n + r * hn)
            h = n + z * (h - n)
        else:
            i, f, g, o = (read + held).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    return torch.stack(out, 1) if out else x.new_zeros(x.size(0), 0, w_state.size(1))


def _spelled_backward(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *tensors, cell = given
    return torch.func.vjp(lambda x, *weights: _spelled(x, *weights, cell), *tensors)[1](grad)  # pyright: ignore[reportCallIssue] - four weights


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.cell = inputs[-1]


def _second(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    pull = torch.func.vjp(lambda *given: _spelled_backward(*given, ctx.cell), *ctx.saved_tensors)[1]
    return (*pull(cotangents), None)


rnn.register_autograd(_backward, setup_context=_setup)
rnn_backward.register_autograd(_second, setup_context=_setup_backward)
instead(rnn, _spelled)
instead(rnn_backward, _spelled_backward)
