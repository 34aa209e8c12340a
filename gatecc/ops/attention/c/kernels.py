"""CPU kernels of ``gatecc::attention``: the C for a dtype, and how tensors are handed to it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gatecc.codegen.c.build import load
from gatecc.codegen.c.source import amalgamated
from gatecc.ops.attention import kernels
from gatecc.ops.attention.arguments import GATE_ACTIVATIONS, TENSORS, Arguments
from gatecc.ops.attention.kernels import Gradients
from gatecc.ops.attention.reference import activated

HEADERS = Path(__file__).parent / "headers"
DTYPES = (torch.float32, torch.bfloat16)
TILE = 6  # rows of a tile, MR of tiles.h
ROWS = 192  # of a job, for which a block of keys is packed once
_LAYOUT = struct.Struct("@5q")
_NOTHING = _LAYOUT.pack(0, 0, 0, 0, 0)
_SHARED = struct.Struct("@7q qq qq ff iii 4x")
_TENSORS = struct.Struct("@9P")
_GRADIENTS = struct.Struct("@4P")
_GATE, _BIAS, _SINKS = 3, 4, 5  # places of the operator's tensors
_MOST = 256  # kinds of calls that are remembered


@cache
def library(dtype: torch.dtype, part: Literal["forward", "backward"] = "forward") -> ctypes.CDLL | None:
    """The kernels for a dtype, built if need be. None without a compiler."""
    found = load(f"#define BF16 {int(dtype == torch.bfloat16)}\n" + amalgamated([HEADERS / f"{part}.h"]))
    if found is not None:
        function = getattr(found, part)
        function.argtypes = [ctypes.c_char_p] * (2 if part == "forward" else 3)
        function.restype = ctypes.c_int
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
        if c.forward(given.shared(out), given.pointers(out, logsumexp)):
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
        """See gatecc.ops.attention.kernels.Kernels. A bias that learns is left to ATen."""
        c = _library(a, "backward")
        if c is None or needs[_BIAS]:
            return None
        plain = a._replace(gate=None)
        delta = (grad.float() * out.float()).sum(-1)
        if grad_logsumexp is not None:
            delta = delta - grad_logsumexp
        delta, logsumexp = delta.contiguous(), logsumexp.contiguous()
        of_gate = None
        if a.gate is not None:
            if needs[_GATE]:
                of_gate = _through_gate(a, grad, self.forward(plain))
            grad = (grad.float() * activated(a.gate.float(), a.gate_activation)).to(a.q.dtype)
        grad = grad if grad.stride(3) == 1 else grad.contiguous()
        dq, dk, dv = (x.new_empty(x.shape) if need else None for x, need in zip(a[:3], needs[:3], strict=True))
        given = _Given(plain)
        found = (0 if x is None else x.data_ptr() for x in (delta, dq, dk, dv))
        tensors = given.pointers(grad, logsumexp)
        if c.backward(given.shared(grad), tensors, _GRADIENTS.pack(*found)):
            raise MemoryError("attention found no memory for its gradients")
        of_sinks = None
        if needs[_SINKS] and a.sinks is not None:
            of_sinks = -(torch.exp(a.sinks.float()[:, None] - logsumexp) * delta).sum((0, 2))
        return dq, dk, dv, of_gate, None, of_sinks


def _through_gate(a: Arguments, grad: Tensor, plain: tuple[Tensor, Tensor] | None) -> Tensor:
    """The gradient of the gate, given the result without it."""
    assert a.gate is not None
    assert plain is not None
    of_activated = grad.float() * plain[0].float()
    if a.gate.size(3) == 1:
        of_activated = of_activated.sum(-1, keepdim=True)
    if a.gate_activation == "identity":
        return of_activated
    x = a.gate.float()
    s = torch.sigmoid(x)
    slope = s * (1 - s) if a.gate_activation == "sigmoid" else s * (1 + x * (1 - s))
    return of_activated * slope


class _Given:
    """The tensors of a call as the kernels read them, which live as long as this does."""

    def __init__(self, a: Arguments) -> None:
        self.a = a
        self.q, self.k, self.v = (x if x.stride(3) == 1 else x.contiguous() for x in (a.q, a.k, a.v))
        self.gate = None if a.gate is None else _readable(a.gate, a.q.dtype)
        self.bias = None if a.bias is None else _readable(a.bias, a.q.dtype)
        self.sinks = None if a.sinks is None else a.sinks.float().contiguous()
        self.blocks = None if a.blocks is None else a.blocks if a.blocks.stride(3) == 1 else a.blocks.contiguous()

    def pointers(self, out: Tensor, logsumexp: Tensor) -> bytes:
        """``struct tensors`` of problem.h."""
        given = (self.q, self.k, self.v, self.gate, self.bias, self.sinks, out, logsumexp, self.blocks)
        return _TENSORS.pack(*[0 if x is None else x.data_ptr() for x in given])

    def shared(self, out: Tensor) -> bytes:
        """``struct attention`` of problem.h. Making it takes longer than a few tokens do, so it is kept."""
        tensors = (self.q, self.k, self.v, self.gate, self.bias, out, self.blocks)
        layouts = [None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors]
        threads = torch.get_num_threads()
        key = (*layouts, threads, self.a._replace(blocks=None)[TENSORS:])
        found = _KEPT.get(key)
        if found is None:
            if len(_KEPT) >= _MOST:
                _KEPT.clear()
            found = _KEPT[key] = b"".join(map(_layout, tensors)) + self._sizes(threads)
        return found

    def _sizes(self, threads: int) -> bytes:
        a = self.a
        (B, H, N, D), (G, S), E = a.q.shape, a.k.shape[1:3], a.v.size(3)
        rows = _rows(B, H, G, N, threads)
        activation = GATE_ACTIVATIONS.index(a.gate_activation)
        options = (a.window or 0, rows, *a.block_sizes, a.scale, a.softcap or 0.0, a.causal, activation, threads)
        return _SHARED.pack(*(B, H, G, N, S, D, E), *options)


_KEPT: dict[Any, bytes] = {}


def _rows(B: int, H: int, G: int, N: int, threads: int) -> int:
    """Queries of a job for each of the H / G heads that share its keys: fewer than memory would have them where
    threads would go without."""
    most = max(ROWS * G // H, TILE)
    blocks = -(-N // most)
    if threads > 1:
        blocks = min(max(blocks, -(-4 * threads // (B * G))), -(-N // TILE))
    each = -(-N // blocks)
    return -(-each // TILE) * TILE


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A gate or bias in the dtype of the queries, in float32 or boolean, its last axis side by side or of one value."""
    x = x if x.dtype in (dtype, torch.float32, torch.bool) else x.float()
    return x if x.stride(3) == 1 or x.size(3) == 1 else x.contiguous()


def _layout(x: Tensor | None) -> bytes:
    """``struct layout``: an axis of size 1 is read at each place of it."""
    if x is None:
        return _NOTHING
    strides = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return _LAYOUT.pack(*strides, 2 if x.dtype == torch.bool else int(x.dtype == torch.float32))


def _library(a: Arguments, part: Literal["forward", "backward"] = "forward") -> ctypes.CDLL | None:
    """None for what is left to ATen: other dtypes, gradients through a map of blocks, and calls without a number."""
    if a.q.dtype not in DTYPES or not (a.q.numel() and a.k.numel() and a.v.numel()):
        return None
    if a.blocks is not None and part == "backward":
        return None
    return library(a.q.dtype, part)


kernels.register("cpu", CpuKernels())
