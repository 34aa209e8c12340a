"""Loops over tokens in torch's own description of RNN, GRU and LSTM layers, which would fix the length of a graph."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

Kernel = Callable[..., Any]
_aten = torch.ops.aten
_LAYERS: tuple[Any, ...] = (_aten.gru.input, _aten.lstm.input, _aten.rnn_tanh.input, _aten.rnn_relu.input)
_KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd)


@contextmanager
def free_lengths() -> Generator[None]:
    """Let recurrent layers be recorded without their length becoming a number.

    A layer is one node of a graph, but to know the shapes of its results torch runs, on fake tensors, a Python loop
    over the tokens. Here one token says them for all.
    """
    before = [(op, key, op.py_kernels[key]) for op in _LAYERS for key in _KEYS if key in op.py_kernels]
    try:
        for op, key, kernel in before:
            _register(op, key, _of_one_token(kernel))
        yield
    finally:
        for op, key, kernel in before:
            _register(op, key, kernel)


def _register(op: Any, key: DispatchKey, kernel: Kernel) -> None:
    """``py_impl`` also forgets which kernels were chosen before."""
    op.py_kernels.pop(key, None)
    op.py_impl(key)(kernel)


def _of_one_token(kernel: Kernel) -> Kernel:
    """torch's Python kernel on the first token, the output spread over all. Only for shapes, never for values."""

    def shapes(
        x: Tensor,
        state: Any,
        weights: list[Tensor],
        biases: bool,
        layers: int,
        dropout: float,
        train: bool,
        both: bool,
        batch_first: bool,
    ) -> Any:
        if not isinstance(x, FakeTensor) or get_proxy_mode() is not None:  # what the kernel does is being recorded
            return kernel(x, state, weights, biases, layers, dropout, train, both, batch_first)
        x = x.transpose(0, 1) if batch_first else x  # (N, B, C)
        out, *states = kernel(x.narrow(0, 0, 1), state, weights, biases, layers, dropout, train, both, False)
        out = out.expand(x.size(0), -1, -1).contiguous()
        return out.transpose(0, 1) if batch_first else out, *states

    return shapes
