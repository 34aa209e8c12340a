"""Each GPU kernel compiled for a GPU, without one, and held to its budgets; here each on one target.

The rest is what ``gatecc kernels check`` compiles.
"""

from __future__ import annotations

import pytest
import torch

from gatecc.codegen.judge.binaries import judge_launch, launches
from gatecc.codegen.judge.compiled import kernel_names, recorded
from gatecc.ops.linear_attention.triton import launch
from gatecc.ops.linear_attention.triton.judged import FAMILY, start

KERNELS_ON = {
    ("sm_80", "gated"): ("scan", "differentiate"),
    ("sm_90", "gated_delta"): ("solve", "delta_scan", "delta_scan_backward"),
    ("gfx942", "gated_delta"): ("mix", "strengths"),
}
CASES = [(target, rule, kernel) for (target, rule), kernels in KERNELS_ON.items() for kernel in kernels]


@pytest.mark.parametrize(("target", "rule", "kernel"), CASES)
def test_it_fits(target: str, rule: str, kernel: str) -> None:
    size = f"{rule}, D=64"
    made = next(x for x in launches(FAMILY, size, "bf16", target) if x.name == kernel)
    found = judge_launch(FAMILY, made, size, "bf16", target)
    assert found.faults == ()
    assert found.exempt == ()


def test_every_kernel_is_compiled() -> None:
    assert {kernel for _, _, kernel in CASES} == set(kernel_names(launch))


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
@pytest.mark.parametrize("D", [16, 20, 256])
def test_what_is_launched(rule: str, D: int) -> None:
    """Blocks are powers of two of at least 16 channels, and a delta rule's states have every key."""
    for dtype, target in ((torch.float32, "sm_90"), (torch.float16, "gfx942")):
        with recorded(target, launch) as found:
            start(rule, D, dtype, per_head=True)
        for made in found:
            sizes = {name: made.given[name] for name in ("BK", "BV") if name in made.given}
            assert all(size in (16, 32, 64, 128, 256) for size in sizes.values())
            assert made.given["PRECISION"] == ("ieee" if target == "gfx942" else "tf32x3")
            if made.name.startswith("delta_scan"):
                assert sizes["BK"] >= D
