"""The CPU kernel of ``gatecc::gated_conv``: which calls it serves, and how it gets their tensors."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gatecc.codegen.c.build import load
from gatecc.codegen.c.source import amalgamated
from gatecc.ops.gated_conv import kernels
from gatecc.ops.gated_conv.arguments import Arguments

_HEADER = Path(__file__).parent / "headers" / "forward.h"
_CALL = struct.Struct("@6P15q2q")


@cache
def _library() -> ctypes.CDLL | None:
    """The kernel, built if need be. None without a compiler."""
    found = load(amalgamated([_HEADER]))
    if found is not None:
        found.forward.argtypes, found.forward.restype = [ctypes.c_char_p], ctypes.c_int
    return found


class CpuKernels:
    """Serves float32 convolutions of two axes on one thread; on several, and of other kinds, ATen's are used."""

    def fits(self, a: Arguments) -> bool:
        """See gatecc.ops.gated_conv.kernels.Kernels."""
        tensors = [t for t in a[:5] if t is not None]
        plain = a.x.dim() == 4 and not a.options["transposed"] and not a.depthwise and torch.get_num_threads() == 1
        return plain and a.x.numel() > 0 and all(t.dtype == torch.float32 for t in tensors) and _library() is not None

    def forward(self, a: Arguments) -> Tensor | None:
        """See gatecc.ops.gated_conv.kernels.Kernels."""
        c, space = _library(), a.space
        y = a.x.new_empty(a.x.size(0), a.weight.size(0), *space)
        tensors = [None if t is None else t.contiguous() for t in (a.x, a.weight, a.bias, a.gate, a.inputs)]
        (B, C, H, W), (KH, KW), o = a.x.shape, a.weight.shape[2:], a.options
        geometry = (KH, KW, *o["stride"], *o["padding"], *o["dilation"])
        steps = (0 if t is None or t.size(0) == 1 else t.size(1) for t in (a.gate, a.inputs))
        places = (0 if t is None else t.data_ptr() for t in tensors)
        call = _CALL.pack(*places, y.data_ptr(), B, C, H, W, a.weight.size(0), *space, *geometry, *steps)
        return y if c is not None and c.forward(call) else None


kernels.register("cpu", CpuKernels())
