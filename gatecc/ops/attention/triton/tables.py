"""What kernels are given besides numbers: operands with their strides, the rule of who sees whom, lists of blocks, the
sizes of blocks."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gatecc.codegen.triton.configs import config, width
from gatecc.codegen.triton.sizes import cdiv
from gatecc.ops.attention.arguments import Arguments

Kernel = Literal["attend", "attend_part", "weigh", "differentiate_queries", "differentiate_keys", "differentiate_bias"]
LARGEST = 256  # channels of a head
_LOG2E = math.log2(math.e)


class Operand(NamedTuple):
    """A tensor (B, H, N, D) as kernels see it. What it lacks has a stride of 0."""

    at: Tensor
    batch: int
    head: int
    token: int
    channel: int


class Rule(NamedTuple):
    """Sizes, and who sees whom.

    offset: the key at the place of query 0; left, right: how many keys before and behind its place a query sees, None
    for all. A score is ``inner`` times the product, in units of log 2, or with a cap ``outer`` tanh(``inner`` times the
    product); scale: its slope at 0, in units of e.
    """

    queries: int
    keys: int
    heads: int
    group: int
    offset: int
    left: int | None
    right: int | None
    inner: float
    outer: float | None
    scale: float


class Blocks(NamedTuple):
    """What a program takes of queries and of keys, at most, and what runs it."""

    queries: int
    keys: int
    warps: int
    stages: int


def rule(a: Arguments) -> Rule:
    """The rule of a call."""
    (_, H, N, _), S = a.q.shape, a.k.size(2)
    left = None if a.window is None else a.window - 1
    right = 0 if a.causal else left
    inner, outer = a.scale * _LOG2E, None
    if a.softcap is not None:
        inner, outer = a.scale / a.softcap, a.softcap * _LOG2E
    return Rule(N, S, H, a.group, S - N, left, right, inner, outer, a.scale)


def blocks(kernel: Kernel, dtype: torch.dtype, widest: int) -> Blocks:
    """The blocks of a kernel on this machine's make of GPU, for heads whose widest block has so many channels."""
    return Blocks(**config(__package__ or "", kernel, width(dtype), str(max(64, widest))))


def operand(x: Tensor | None) -> Operand | None:
    """x as kernels see it; an axis of one is read for every index."""
    if x is None:
        return None
    sizes = zip(x.shape, x.stride(), strict=True)
    return Operand(x, *(0 if size == 1 else stride for size, stride in sizes))


def splits(programs: int, blocks_of_keys: int) -> int:
    """Into how many parts keys are split for so many programs without: enough to keep a GPU busy, as a power of two."""
    wanted = min(cdiv(config(__package__ or "", "programs")["at_once"], max(1, programs)), blocks_of_keys, 64)
    return 1 << max(0, wanted - 1).bit_length() if wanted < 64 else 64
