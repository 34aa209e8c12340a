"""CPU kernels of ``gatecc::short_convolution``: the C for a dtype and a number of taps, and how it gets tensors."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gatecc.codegen.c.build import load
from gatecc.codegen.c.source import amalgamated

HEADERS = Path(__file__).parent / "headers"
DTYPES = (torch.float32, torch.bfloat16)
_CALL = struct.Struct("@PqqPPP3qii")


@cache
def _library(dtype: torch.dtype, taps: int) -> ctypes.CDLL | None:
    """The kernel, built if need be. None without a compiler."""
    constants = f"#define BF16 {int(dtype == torch.bfloat16)}\n#define TAPS {taps}\n"
    found = load(constants + amalgamated([HEADERS / "forward.h"]))
    if found is not None:
        found.forward.argtypes, found.forward.restype = [ctypes.c_char_p], ctypes.c_int
    return found


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor | None:
    """x: (B, N, C), weight: (C, 1, K), bias: (C,) -> (B, N, C), contiguous; None where the kernel cannot run."""
    c = _library(x.dtype, weight.size(2)) if x.dtype in DTYPES else None
    if c is None:
        return None
    x = x if x.stride(2) == 1 else x.contiguous()
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    call = _CALL.pack(
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        *x.shape,
        silu,
        torch.get_num_threads(),
    )
    return y if c.forward(call) else None


__all__ = ["DTYPES", "forward"]
