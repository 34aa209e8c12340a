"""Small kernels with a fault each, and one without: ``python -m`` runs them in the interpreter and prints findings."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl

from gatecc.codegen.judge.interpreted import watched


@triton.jit
def product(x: tl.tensor, y: tl.tensor, out: tl.tensor, scale: tl.tensor, WIDE: tl.constexpr, N: tl.constexpr) -> None:
    """out = scale x y of N x N, with sums of its rows in float64 if WIDE."""
    at = tl.expand_dims(tl.arange(0, N), 1) * N + tl.expand_dims(tl.arange(0, N), 0)
    z = tl.dot(tl.load(x + at), tl.load(y + at)) * scale
    if WIDE:
        z += tl.expand_dims(tl.sum(z.to(tl.float64), 1), 1).to(tl.float32)
    tl.store(out + at, z)


@triton.jit
def copied(
    x: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr, MASKED: tl.constexpr, STEP: tl.constexpr
) -> None:
    """out = x by blocks that begin STEP apart."""
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    mask = at < (count if MASKED else 10 * BLOCK)
    tl.store(out + at, tl.load(x + at, mask=mask), mask=mask)


@triton.jit
def halves(x: tl.tensor, y: tl.tensor, out: tl.tensor, N: tl.constexpr) -> None:
    """out = x y and x y + x, element by element, and as a product of N x N: all in bfloat16."""
    at = tl.expand_dims(tl.arange(0, N), 1) * N + tl.expand_dims(tl.arange(0, N), 0)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a * b)
    tl.store(out + N * N + at, (a.to(tl.float32) * b + a).to(tl.bfloat16))
    tl.store(out + 2 * N * N + at, tl.dot(a, b).to(tl.bfloat16))


def _launched(kernel: Any) -> Any:
    """A kernel as what is called: its annotations are those that it has inside."""
    return kernel


def main() -> None:
    found, run = dict[str, Any](), _launched(copied)
    for name, masked, step in (("right", True, 8), ("no mask", False, 8), ("overlap", True, 6)):
        x = torch.arange(20.0)
        with watched() as findings:
            run[(3,)](x, torch.zeros(20), 20, BLOCK=8, MASKED=masked, STEP=step)
        found[name] = asdict(findings)
    torch.manual_seed(0)
    x, y = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = x.new_empty(3, 16, 16)
    with watched():
        _launched(halves)[(1,)](x, y, out, N=16)
    wanted = torch.stack([x * y, (x.float() * y + x).bfloat16(), x @ y])
    found["bfloat16"] = [int((a != b).sum()) for a, b in zip(out, wanted, strict=True)]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
