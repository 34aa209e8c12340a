"""A launcher of one kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def scaled(
    x: tl.tensor, out: tl.tensor, count: tl.tensor, factor: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """out = factor x."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < (count if MASKED else 1 << 30)
    tl.store(out + at, tl.load(x + at, mask=mask) * factor, mask=mask)


def launch(x: Tensor, factor: float, masked: bool) -> Tensor:
    """factor x."""
    out, kernel = torch.empty_like(x), _launched(scaled)
    kernel[(-(-x.numel() // 2048),)](x, out, x.numel(), factor=factor, MASKED=masked, BLOCK=2048, num_warps=4)
    return out


def _launched(kernel: Any) -> Any:
    return kernel
