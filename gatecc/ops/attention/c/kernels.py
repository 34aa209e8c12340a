"""CPU kernels of ``gatecc::attention``: the C for a dtype, and how tensors are handed to it."""

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
from gatecc.ops.attention import kernels
from gatecc.ops.attention.arguments import GATE_ACTIVATIONS, Arguments
from gatecc.ops.attention.kernels import Gradients

HEADERS = Path(__file__).parent / "headers"
DTYPES = (torch.float32, torch.bfloat16)
TILE = 6  # rows of a tile, MR of tiles.h
ROWS = 192  # of a job, for which a block of keys is packed once
_OPERAND = struct.Struct("@P5q")
_REST = struct.Struct("@PP 7q qq ff iii 4x")


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for a dtype, built if need be. None without a compiler."""
    found = load(f"#define BF16 {int(dtype == torch.bfloat16)}\n" + amalgamated([HEADERS / "forward.h"]))
    if found is not None:
        found.forward.argtypes, found.forward.restype = [ctypes.c_char_p], ctypes.c_int
    return found


class CpuKernels:
    """Serves float32 and bfloat16 on the CPU."""

    def forward(self, a: Arguments) -> tuple[Tensor, Tensor] | None:
        """See gatecc.ops.attention.kernels.Kernels."""
        c = _library(a)
        if c is None:
            return None
        out, logsumexp = a.new_output(), a.new_logsumexp()
        given = _Given(a)
        if c.forward(given.packed(out, logsumexp)):
            raise MemoryError("attention found no memory for a block of keys")
        return out, logsumexp

    def backward(
        self,
        a: Arguments,
        out: Tensor,
        logsumexp: Tensor,
        grad: Tensor,
        grad_logsumexp: Tensor | None,
        needs: Sequence[bool],
    ) -> Gradients | None:
        """See gatecc.ops.attention.kernels.Kernels."""
        return None


class _Given:
    """The tensors of a call as the kernels read them, which live as long as this does."""

    def __init__(self, a: Arguments) -> None:
        self.a = a
        self.q, self.k, self.v = (x if x.stride(3) == 1 else x.contiguous() for x in (a.q, a.k, a.v))
        self.gate = _readable(a.gate, a.q.dtype)
        self.bias = _readable(a.bias, a.q.dtype)
        self.sinks = None if a.sinks is None else a.sinks.float().contiguous()

    def packed(self, out: Tensor, logsumexp: Tensor) -> bytes:
        """``struct attention`` of problem.h."""
        a = self.a
        (B, H, N, D), (G, S), E = a.q.shape, a.k.shape[1:3], a.v.size(3)
        operands = (self.q, self.k, self.v, self.gate, self.bias, out)
        return b"".join(_operand(x) for x in operands) + _REST.pack(
            0 if self.sinks is None else self.sinks.data_ptr(),
            logsumexp.data_ptr(),
            *(B, H, G, N, S, D, E),
            a.window or 0,
            _rows(B, H, G, N),
            a.scale,
            a.softcap or 0.0,
            a.causal,
            GATE_ACTIVATIONS.index(a.gate_activation),
            torch.get_num_threads(),
        )


def _rows(B: int, H: int, G: int, N: int) -> int:
    """Queries of a job for each of the H / G heads that share its keys: fewer than memory would have them where
    threads would go without."""
    most = max(ROWS * G // H, TILE)
    blocks = -(-N // most)
    threads = torch.get_num_threads()
    if threads > 1:
        blocks = min(max(blocks, -(-4 * threads // (B * G))), -(-N // TILE))
    each = -(-N // blocks)
    return -(-each // TILE) * TILE


def _readable(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A gate or bias in the dtype of the queries, in float32 or boolean, its last axis side by side or of one value."""
    if x is None:
        return None
    x = x if x.dtype in (dtype, torch.float32, torch.bool) else x.float()
    return x if x.stride(3) == 1 or x.size(3) == 1 else x.contiguous()


def _operand(x: Tensor | None) -> bytes:
    """``struct operand``: an axis of size 1 is read at each place of it."""
    if x is None:
        return _OPERAND.pack(0, 0, 0, 0, 0, 0)
    strides = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    kind = 2 if x.dtype == torch.bool else int(x.dtype == torch.float32)
    return _OPERAND.pack(x.data_ptr(), *strides, kind)


def _library(a: Arguments) -> ctypes.CDLL | None:
    """None for what is left to ATen: other dtypes, maps of blocks, and calls without a single number."""
    full = a.blocks is None and all(t.numel() for t in (a.q, a.k, a.v))
    return library(a.q.dtype) if full and a.q.dtype in DTYPES else None


kernels.register("cpu", CpuKernels())
