"""Masks between groups of units: runs of kept blocks as products on slices, against the dense matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from _table import Row, best_of

from gatecc.ops import group_linear as group_linear  # registers gatecc::group_linear

WIDTH, GROUPS = 1024, 8


def groups() -> Iterator[Row]:
    """A quarter of 8 x 8 blocks of a matrix 1024 x 1024 kept: the operator against the dense product."""
    torch.set_num_threads(1)
    weight, bias = torch.randn(WIDTH, WIDTH) / 32, torch.randn(WIDTH)
    mask = torch.zeros(GROUPS * GROUPS, dtype=torch.bool)
    mask[torch.randperm(GROUPS * GROUPS)[: GROUPS * GROUPS // 4]] = True
    mask = mask.view(GROUPS, GROUPS)
    cut = WIDTH // GROUPS
    masked = weight * mask.repeat_interleave(cut, 0).repeat_interleave(cut, 1)
    for tokens in (512, 1):
        x = torch.randn(tokens, WIDTH)
        with torch.no_grad():
            skipped, dense = best_of(
                lambda x=x: torch.ops.gatecc.group_linear(x, weight, mask, bias),
                lambda x=x: F.linear(x, masked, bias),
                repeats=30,
            )
        bar = 0.5 if tokens > 1 else None  # one token: sixteen small products cost their calls
        yield Row(f"1/4 of 8 x 8 groups kept, {tokens} tokens: time / dense", skipped / dense, bar)
