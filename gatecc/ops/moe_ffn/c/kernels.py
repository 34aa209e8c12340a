"""CPU kernels of ``gatecc::moe_ffn``: the C for a dtype, and how tensors are handed to it.

Weights are read as they lie, whatever their strides: panels of them are packed as they are used, by the block of rows
that uses them, so that nothing is kept beside the weights, and nothing can be stale.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gatecc.codegen.c.build import load
from gatecc.codegen.c.source import amalgamated
from gatecc.ops.moe_ffn import kernels
from gatecc.ops.moe_ffn.activations import LAYOUTS
from gatecc.ops.moe_ffn.arguments import Arguments
from gatecc.ops.moe_ffn.schedule import check_range
from gatecc.ops.moe_ffn.segments import Gradients

HEADERS = Path(__file__).parent / "headers"
DTYPES = (torch.float32, torch.bfloat16)
KINDS: Sequence[str] = (  # the order of functions.h
    "identity relu relu2 relu6 silu gelu gelu(tanh) quick_gelu tanh sigmoid mish softplus hardswish leaky_relu elu "
    "selu swiglu"
).split()
_CALL = struct.Struct("@PqPP PqqqPqqq PPPP 6q iff iii")
_GRADIENTS = struct.Struct("@8P")


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for a dtype, built if need be. None without a compiler."""
    found = load(f"#define BF16 {int(dtype == torch.bfloat16)}\n" + amalgamated([HEADERS / "backward.h"]))
    if found is not None:
        found.forward.argtypes, found.forward.restype = [ctypes.c_char_p], ctypes.c_int
        found.backward.argtypes, found.backward.restype = [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_int
    return found


class CpuKernels:
    """Serves float32 and bfloat16 on the CPU."""

    def forward(self, a: Arguments, *, keep: bool) -> tuple[Tensor, Tensor | None] | None:
        """See gatecc.ops.moe_ffn.kernels.Kernels."""
        c = _library(a)
        if c is None:
            return None
        out = a.x.new_empty(a.output_shape)
        hidden = a.x.new_empty(a.hidden_shape) if keep else None
        given = _Given(a)
        _check(c.forward(given.packed(out, hidden)), a)
        return out, hidden

    def backward(self, a: Arguments, grad: Tensor, hidden: Tensor, needs: list[bool]) -> Gradients | None:
        """See gatecc.ops.moe_ffn.kernels.Kernels."""
        c = _library(a)
        if c is None:
            return None
        x, gate_up, down, *biases = (
            t.new_empty(t.shape) if need and t is not None else None
            for t, need in zip((a.x, *a[3:7]), (needs[0], *needs[2:]), strict=True)
        )
        weights = a.weights.new_empty(a.weights.shape, dtype=torch.float32)
        given, grad, hidden = _Given(a), grad.contiguous(), hidden.contiguous()
        tensors = (grad, hidden, x, weights, gate_up, down, *biases)
        _check(c.backward(given.packed(None, None), _GRADIENTS.pack(*map(_pointer, tensors))), a)
        return Gradients(x, weights.to(a.weights.dtype) if needs[1] else None, gate_up, down, *biases)


class _Given:
    """The tensors of a call as the kernels read them, which live as long as this does."""

    def __init__(self, a: Arguments) -> None:
        self.a = a
        self.x = a.x if a.x.stride(1) == 1 else a.x.contiguous()
        self.weights, self.indices = a.weights.float().contiguous(), a.indices.contiguous()
        self.biases = [b if b is None else b.contiguous() for b in (a.gate_up_bias, a.down_bias)]

    def packed(self, out: Tensor | None, hidden: Tensor | None) -> bytes:
        """``struct experts`` of experts.h."""
        a = self.a
        options = (*a.activation.options.values(), 0.0, 0.0)
        return _CALL.pack(
            self.x.data_ptr(),
            self.x.stride(0),
            self.weights.data_ptr(),
            self.indices.data_ptr(),
            a.gate_up.data_ptr(),
            *a.gate_up.stride(),
            a.down.data_ptr(),
            *a.down.stride(),
            *map(_pointer, self.biases),
            _pointer(out),
            _pointer(hidden),
            a.tokens,
            a.slots,
            a.experts,
            a.x.size(1),
            a.down.size(2),
            a.down.size(1),
            KINDS.index(a.activation.name),
            options[0],
            options[1],
            LAYOUTS.index(a.layout),
            a.combine == "slots",
            torch.get_num_threads(),
        )


def _library(a: Arguments) -> ctypes.CDLL | None:
    """None for what is left to ATen: other dtypes, and calls without a single number."""
    full = all(t.numel() for t in (a.x, a.indices, a.gate_up, a.down))
    return library(a.x.dtype) if full and a.x.dtype in DTYPES else None


def _check(failed: int, a: Arguments) -> None:
    check_range(failed != 1, a.indices, a.experts)
    if failed:
        raise MemoryError("moe_ffn found no memory for its intermediate results")


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


kernels.register("cpu", CpuKernels())
