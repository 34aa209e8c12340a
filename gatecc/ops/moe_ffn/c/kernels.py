"""CPU kernels of ``gatecc::moe_ffn``: the C for a dtype, and how tensors are handed to it.

Weights are read as they lie, whatever their strides: panels of them are packed as they are used, by the block of rows
that uses them, so that nothing is kept beside the weights, and nothing can be stale.
"""

from __future__ import annotations

import ctypes
import struct
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
KINDS: list[str] = (  # the order of functions.h
    "identity relu relu2 relu6 silu gelu gelu(tanh) quick_gelu tanh sigmoid mish softplus hardswish leaky_relu elu "
    "selu swiglu"
).split()
_CALL = struct.Struct("@PqPP PqqqPqqq PPPP 6q iiff iii")


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for a dtype, built if need be. None without a compiler."""
    found = load(f"#define BF16 {int(dtype == torch.bfloat16)}\n" + amalgamated([HEADERS / "experts.h"]))
    if found is not None:
        found.forward.argtypes, found.forward.restype = [ctypes.c_char_p], ctypes.c_int
    return found


class CpuKernels:
    """Serves float32 and bfloat16 on the CPU."""

    def forward(self, a: Arguments, *, keep: bool) -> tuple[Tensor, Tensor | None] | None:
        """See gatecc.ops.moe_ffn.kernels.Kernels."""
        c = library(a.x.dtype) if a.x.dtype in DTYPES and a.indices.numel() and a.x.numel() else None
        if c is None or not a.gate_up.numel() or not a.down.numel():
            return None
        out = a.x.new_empty(a.output_shape)
        hidden = a.x.new_empty(a.hidden_shape) if keep else None
        x = a.x if a.x.stride(1) == 1 else a.x.contiguous()
        weights, indices = a.weights.float().contiguous(), a.indices.contiguous()
        biases = [b if b is None else b.contiguous() for b in (a.gate_up_bias, a.down_bias)]
        options = [*a.activation.options.values(), 0.0, 0.0][:2]
        failed = c.forward(
            _CALL.pack(
                x.data_ptr(),
                x.stride(0),
                weights.data_ptr(),
                indices.data_ptr(),
                a.gate_up.data_ptr(),
                *a.gate_up.stride(),
                a.down.data_ptr(),
                *a.down.stride(),
                *map(_pointer, biases),
                out.data_ptr(),
                _pointer(hidden),
                a.tokens,
                a.slots,
                a.experts,
                a.x.size(1),
                a.down.size(2),
                a.down.size(1),
                KINDS.index(a.activation.name),
                a.activation.of_both,
                *options,
                LAYOUTS.index(a.layout),
                a.combine == "slots",
                torch.get_num_threads(),
            )
        )
        check_range(failed != 1, indices, a.experts)
        if failed:
            raise MemoryError("moe_ffn found no memory for its intermediate results")
        return out, hidden

    def backward(self, a: Arguments, grad: Tensor, hidden: Tensor, needs: list[bool]) -> Gradients | None:
        """See gatecc.ops.moe_ffn.kernels.Kernels."""
        return None


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


kernels.register("cpu", CpuKernels())
