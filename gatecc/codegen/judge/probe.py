"""A kernel that uses all that the judge replaces in Triton's interpreter, and what it must compute."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def probe(x: tl.tensor, y: tl.tensor, out: tl.tensor, count: tl.tensor, N: tl.constexpr) -> None:
    """out = y + the sum of x y, in bfloat16: a product, a reduction, a method of tensors, masks."""
    at = tl.arange(0, N)
    a, b = tl.load(x + at, mask=at < count, other=0.0), tl.load(y + at, mask=at < count, other=0.0)
    tl.store(out + at, (b + (a * b).sum(0).to(tl.bfloat16)).to(tl.float32), mask=at < count)


def works(kernel: Any) -> bool:
    """Whether ``kernel``, the probe in an interpreter, computes what torch does and keeps to its mask."""
    x, y = torch.tensor([1.0, 1.0078125, 3.0]).bfloat16(), torch.tensor([1.0078125, 1.0078125, 0.5]).bfloat16()
    out = torch.full((4,), 7.0)
    kernel[(1,)](x, y, out, 3, N=4)
    wanted = y + (x * y).float().sum().bfloat16()
    return torch.equal(out, torch.cat([wanted.float(), torch.tensor([7.0])]))
