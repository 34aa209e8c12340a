"""How much faster than torch's fused attention the C kernel is on this CPU: measured, kept as data (gains.json).

One number for each kind of CPU, dtype, kind of mask and length: the time of scaled_dot_product_attention over that of
the operator, calls through torch.ops included, on 4 heads of width 64 (``benchmarks/attention.py --gains``). More heads
gain more, for a call costs the same.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from gatecc.ops.attention.c.kernels import DTYPES, library

Kind = Literal["full", "causal", "masked"]
SHORTEST = 32  # tokens, below which no kind gains
_TABLE = Path(__file__).parent / "gains.json"


def gain(dtype: torch.dtype, kind: Kind, queries: int, keys: int, *, training: bool = False) -> float:
    """Times the speed of torch's fused attention, 0 without a kernel. ``masked``: a mask is read, not proved."""
    length = min(queries, keys)
    if dtype not in DTYPES or length < SHORTEST or library(dtype) is None:
        return 0.0
    rows = _gains(dtype, kind, training)
    lengths = [row[0] for row in rows]
    at = bisect_left(lengths, length)
    if at == 0:
        return rows[0][1] if length == lengths[0] else 0.0
    if at == len(rows):
        return rows[-1][1]
    (low, before), (high, after) = rows[at - 1], rows[at]
    return before + (after - before) * (length - low) / (high - low)


def unit() -> str:
    """The kind of CPU that the kernels were built for."""
    c = library(torch.float32)
    return "none" if c is None else {16: "avx512", 8: "avx2"}.get(c.vector_lanes(), "other")


@cache
def _gains(dtype: torch.dtype, kind: Kind, training: bool) -> list[tuple[int, float]]:
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    c = library(dtype)
    # Without products of bfloat16 both kinds of CPU compute in float32.
    single = dtype == torch.bfloat16 and c is not None and c.numbers_of_a_lane() == 1
    of_unit = table["avx2"] if single else table.get(unit(), table["avx2"])
    rows = of_unit[str(dtype).removeprefix("torch.")][f"{kind}, training" if training else kind]
    return sorted((int(length), value) for length, value in rows.items())
