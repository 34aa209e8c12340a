"""The CPU kernel of ``gatecc::evicted_attention``: which calls it serves, and how it gets their tensors."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gatecc.codegen.c.build import load
from gatecc.codegen.c.source import amalgamated
from gatecc.ops.evicted_attention import kernels
from gatecc.ops.evicted_attention.kernels import State
from gatecc.ops.evicted_attention.presence import Rule

_HEADER = Path(__file__).parent / "headers" / "step.h"
_CALL = struct.Struct("@10P7q2fq")
_DTYPES = (torch.float32, torch.bfloat16)
_GROUP, _WIDTH = 64, 1024  # query heads of a key head, and features of a head, that its memory is made for


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel, built if need be. None without a compiler."""
    found = load(f"#define BF16 {int(dtype == torch.bfloat16)}\n" + amalgamated([_HEADER]))
    if found is not None:
        found.step.argtypes, found.step.restype = [ctypes.c_char_p], ctypes.c_int
    return found


class CpuKernels:
    """Serves float32 and bfloat16."""

    def fits(self, q: Tensor, v: Tensor, keys: Tensor) -> bool:
        """See gatecc.ops.evicted_attention.kernels.Kernels."""
        small = q.size(1) <= _GROUP * v.size(1) and max(q.size(3), v.size(3)) <= _WIDTH
        return small and q.dtype in _DTYPES and keys.dtype == q.dtype and _library(q.dtype) is not None

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor,
        valid: Tensor | None,
        state: State,
        scale: float,
        rule: Rule,
        softcap: float,
    ) -> tuple[Tensor, Tensor] | None:
        """See gatecc.ops.evicted_attention.kernels.Kernels."""
        c = _library(q.dtype)
        assert c is not None
        (B, H, _, D), (K, _, E) = q.shape, v.shape[1:]
        out, after = q.new_empty((B, H, 1, E)), torch.empty_like(state[2])
        tensors = [q, k, v, keep.float(), None if valid is None else valid.bool()]
        read = [None if t is None else t.contiguous() for t in tensors]
        places = (0 if t is None else t.data_ptr() for t in (*read, *state, after, out))
        threads = torch.get_num_threads()
        call = _CALL.pack(*places, B, H, K, D, E, *rule, scale, softcap, threads)
        return (out, after) if c.step(call) else None


kernels.register("cpu", CpuKernels())
