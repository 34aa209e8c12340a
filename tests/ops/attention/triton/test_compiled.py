"""The GPU kernels of attention compiled for GPUs, without one, and held to their budgets; here a few.

The rest is what ``gatecc kernels check`` compiles.
"""

from __future__ import annotations

import pytest
import torch

from gatecc.codegen.judge.binaries import judge_launch, launches
from gatecc.codegen.judge.compiled import kernel_names, recorded
from gatecc.ops.attention.triton import launch
from gatecc.ops.attention.triton.judged import FAMILY, SIZES, start

CASES = [
    ("sm_80", "bf16", "one query, D=64", "attend_part"),
    ("sm_90", "bf16", "one query, D=64", "join"),
    ("gfx942", "bf16", "D=64", "weigh"),
]


@pytest.mark.parametrize(("target", "dtype", "size", "kernel"), CASES)
def test_it_fits(target: str, dtype: str, size: str, kernel: str) -> None:
    made = next(x for x in launches(FAMILY, size, dtype, target) if x.name == kernel)
    assert judge_launch(FAMILY, made, size, dtype, target).faults == ()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_is_launched(target: str) -> None:
    """Every kernel at some size; blocks that are powers of two and fit what there is; lists where there is a map."""
    met: set[str] = set()
    for size, begin in SIZES.items():
        with recorded(target, launch) as made:
            begin(torch.float32)
        met |= {x.name for x in made}
        for x in made:
            sides = [x.given[name] for name in ("BM", "BN") if name in x.given]
            assert all(side >= 16 and not side & (side - 1) for side in sides)
            assert x.given.get("PRECISION") in (None, "tf32x3" if target == "sm_90" else "ieee")
            assert ("listed" in x.given and x.given["listed"] is not None) == (
                "blocks" in size and x.name not in ("weigh", "join", "differentiate_bias")
            )
    assert met == set(kernel_names(launch))


def test_a_step_is_split_for_few_sequences_only() -> None:
    """Programs of a step are about as many as a GPU runs at once, whatever the batch."""
    found: list[int] = []
    for queries in (1, 4):
        with recorded("sm_90", launch) as made:
            start(64, torch.bfloat16, queries=queries, few=True)
        found.append(made[0].grid[0])
    assert found[0] == found[1] == 4 * made[0].given["splits"] >= 128
