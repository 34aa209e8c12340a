"""CPU kernels of ``gatecc::short_convolution``: the C for a dtype and a number of taps, and how it gets tensors."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gatecc.codegen.c.build import load
from gatecc.codegen.c.source import amalgamated
from gatecc.ops.short_convolution import kernels
from gatecc.ops.short_convolution.arguments import DTYPES, TAPS, Arguments
from gatecc.ops.short_convolution.kernels import Gradients

HEADERS = Path(__file__).parent / "headers"
_CALL = struct.Struct("@Pqq3P3qii")
_RESULTS = struct.Struct("@2P")
_GRADIENTS = struct.Struct("@Pqq4P")


@cache
def _library(dtype: torch.dtype, taps: int, part: Literal["forward", "backward"]) -> ctypes.CDLL | None:
    """The kernel, built if need be. None without a compiler."""
    constants = f"#define BF16 {int(dtype == torch.bfloat16)}\n#define TAPS {taps}\n"
    found = load(constants + amalgamated([HEADERS / f"{part}.h"]))
    if found is not None:
        function = getattr(found, part)
        function.argtypes, function.restype = [ctypes.c_char_p] * 2, ctypes.c_int
    return found


class CpuKernels:
    """Serves float32 and bfloat16 on the CPU."""

    def forward(self, a: Arguments) -> tuple[Tensor, Tensor] | None:
        """See gatecc.ops.short_convolution.kernels.Kernels."""
        c = _fitting(a, "forward")
        if c is None:
            return None
        y, after = torch.empty(a.x.shape, dtype=a.x.dtype), torch.empty(a.state_shape, dtype=a.x.dtype)
        read = _readable(a)
        return (y, after) if c.forward(_packed(read), _RESULTS.pack(y.data_ptr(), after.data_ptr())) else None

    def backward(self, a: Arguments, grad: Tensor, needs: list[bool]) -> Gradients | None:
        """See gatecc.ops.short_convolution.kernels.Kernels."""
        c = _fitting(a, "backward")
        if c is None:
            return None
        read = _readable(a)
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        found = tuple(
            torch.empty(x.shape, dtype=x.dtype) if need and x is not None else None
            for x, need in zip(a.tensors, needs, strict=True)
        )
        places = (0 if x is None else x.data_ptr() for x in found)
        gradients = _GRADIENTS.pack(grad.data_ptr(), grad.stride(0), grad.stride(1), *places)
        return found if c.backward(_packed(read), gradients) else None


def _fitting(a: Arguments, part: Literal["forward", "backward"]) -> ctypes.CDLL | None:
    """None for what is left to ATen: other dtypes and numbers of taps, and calls without a number."""
    fits = a.x.dtype in DTYPES["cpu"] and a.taps in TAPS and a.x.numel()
    return _library(a.x.dtype, a.taps, part) if fits else None


def _readable(a: Arguments) -> Arguments:
    """Tensors as the kernels read them."""
    x = a.x if a.x.stride(2) == 1 else a.x.contiguous()
    bias, state = (None if t is None else t.contiguous() for t in (a.bias, a.state))
    return Arguments(x, a.weight.contiguous(), bias, state, a.activation)


def _packed(a: Arguments) -> bytes:
    """``struct convolution`` of problem.h; the tensors are to live as long as it is read."""
    x = a.x
    places = (0 if t is None else t.data_ptr() for t in (a.weight, a.bias, a.state))
    silu = a.activation == "silu"
    return _CALL.pack(x.data_ptr(), x.stride(0), x.stride(1), *places, *x.shape, silu, torch.get_num_threads())


kernels.register("cpu", CpuKernels())
