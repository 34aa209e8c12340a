"""Each GPU kernel compiled for a GPU, without one, and held to what a GPU can give it.

Here each on one target, with heads of 64 channels in bfloat16: compiling takes seconds. The rest is printed by
``python -m tests.ops.linear_attention.triton.compiled``.
"""

from __future__ import annotations

import pytest
import torch

from gatecc.codegen.judge.compiled import compile_launch, faults
from tests.ops.linear_attention.triton.compiled import KERNELS, launches

KERNELS_ON = {
    ("sm_80", "gated"): ("scan", "differentiate"),
    ("sm_90", "gated_delta"): ("solve", "delta_scan", "delta_scan_backward"),
    ("gfx942", "gated_delta"): ("mix", "strengths"),
}
CASES = [(target, rule, kernel) for (target, rule), kernels in KERNELS_ON.items() for kernel in kernels]


@pytest.mark.parametrize(("target", "rule", "kernel"), CASES)
def test_it_fits(target: str, rule: str, kernel: str) -> None:
    made = next(x for x in launches(target, rule, torch.bfloat16) if x.name == kernel)
    assert faults(compile_launch(made, target), target) == []


def test_every_kernel_is_compiled() -> None:
    assert {kernel for _, _, kernel in CASES} == set(KERNELS)


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
@pytest.mark.parametrize("D", [16, 20, 256])
def test_what_is_launched(rule: str, D: int) -> None:
    """Blocks are powers of two of at least 16 channels, and a delta rule's states have every key."""
    for dtype, target in ((torch.float32, "sm_90"), (torch.float16, "gfx942")):
        for made in launches(target, rule, dtype, D, per_head=True):
            sizes = {name: made.given[name] for name in ("BK", "BV") if name in made.given}
            assert all(size in (16, 32, 64, 128, 256) for size in sizes.values())
            assert made.given["PRECISION"] == ("ieee" if target == "gfx942" else "tf32x3")
            if made.name.startswith("delta_scan"):
                assert sizes["BK"] >= D
