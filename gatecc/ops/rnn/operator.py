"""``gatecc::rnn``: a GRU or LSTM over a sequence as one operator, so that captured graphs keep any length.

``aten.gru`` and ``aten.lstm`` are unrolled while a graph is traced, which fixes the length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ops.transforms import instead

_STATES = {"gru": 1, "lstm": 2}


@torch.library.custom_op("gatecc::rnn", mutates_args=())
def rnn(
    x: Tensor,
    w_in: Tensor,
    w_state: Tensor,
    b_in: Tensor,
    b_state: Tensor,
    cell: str,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x: (B, N, C) -> hidden states (B, N, H), and the state after the last token.

    w_in: (3H or 4H, C), w_state: (3H or 4H, H) and biases as in torch.nn.GRU ("gru") and torch.nn.LSTM ("lstm").
    state: (1, B, H), or (2, B, H) for the hidden and the cell state of an LSTM; None is zero.
    """
    out, last = _run(x, w_in, w_state, b_in, b_state, _start(x, w_state, cell, state), cell)
    return out.contiguous(), last.contiguous()


@rnn.register_fake
def _(
    x: Tensor,
    w_in: Tensor,
    w_state: Tensor,
    b_in: Tensor,
    b_state: Tensor,
    cell: str,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    H = w_state.size(1)
    return x.new_empty(x.size(0), x.size(1), H), x.new_empty(_states(cell), x.size(0), H)


@torch.library.custom_op("gatecc::rnn_backward", mutates_args=())
def rnn_backward(
    grad: Tensor,
    grad_last: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_state: Tensor,
    b_in: Tensor,
    b_state: Tensor,
    state: Tensor,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the four weights and the state; the forward pass is run again rather than kept."""
    # Inside an operator autograd is off; torch.func brings its own.
    given = (x, w_in, w_state, b_in, b_state, state)
    pull = torch.func.vjp(lambda *leaves: _run(*leaves, cell), *given)[1]  # pyright: ignore[reportCallIssue] - six of them
    gx, gw, gs, gb, gt, g0 = (g.contiguous() for g in pull((grad, grad_last)))
    return gx, gw, gs, gb, gt.clone(), g0


@rnn_backward.register_fake
def _(grad: Tensor, grad_last: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in given[:6])


def _start(x: Tensor, w_state: Tensor, cell: str, state: Tensor | None) -> Tensor:
    return x.new_zeros(_states(cell), x.size(0), w_state.size(1)) if state is None else state


def _states(cell: str) -> int:
    if cell not in _STATES:
        raise ArgumentError("no such cell", found=cell, expected="gru, lstm")
    return _STATES[cell]


def _run(
    x: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor, state: Tensor, cell: str
) -> tuple[Tensor, Tensor]:
    options: tuple[Any, ...] = ([w_in, w_state, b_in, b_state], True, 1, 0.0, False, False, True)
    if cell == "gru":
        out, last = torch.gru(x, state, *options)
        return out, last
    out, *last = torch.lstm(x, state.split(1), *options)
    return out, torch.cat(last)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.cell, state = inputs
    ctx.save_for_backward(*tensors, state)


def _backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, state = ctx.saved_tensors
    start = _start(tensors[0], tensors[2], ctx.cell, state)
    *found, of_state = rnn_backward(grad.contiguous(), grad_last.contiguous(), *tensors, start, ctx.cell)
    return (*found, None, None if state is None else of_state)


def _spelled(
    x: Tensor,
    w_in: Tensor,
    w_state: Tensor,
    b_in: Tensor,
    b_state: Tensor,
    cell: str,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``rnn`` token by token in plain ATen: differentiable to any order, in both modes, and under torch.func.

    torch.gru and torch.lstm have kernels that are differentiable once.
    """
    start = _start(x, w_state, cell, state)
    h = c = start[0]
    c = start[1] if cell == "lstm" else c
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
    last = torch.stack([h, c] if cell == "lstm" else [h])
    return torch.stack(out, 1) if out else x.new_zeros(x.size(0), 0, w_state.size(1)), last


def _spelled_backward(grad: Tensor, grad_last: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *tensors, cell = given

    def forward(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        x, w_in, w_state, b_in, b_state, state = leaves
        return _spelled(x, w_in, w_state, b_in, b_state, cell, state)

    return torch.func.vjp(forward, *tensors)[1]((grad, grad_last))


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
