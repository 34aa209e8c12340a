"""Each GPU kernel compiled for GPUs, without one, and held to its budgets; here each on one or two targets.

The rest is what ``gatecc kernels check`` compiles.
"""

from __future__ import annotations

import pytest
import torch

from gatecc.codegen.judge.binaries import judge_launch, launches
from gatecc.codegen.judge.compiled import kernel_names, recorded
from gatecc.ops.moe_ffn.triton import launch
from gatecc.ops.moe_ffn.triton.judged import FAMILY, LOADS, start

CASES = [
    ("sm_90", "bf16", "many", "activate"),
    ("sm_80", "bf16", "few", "project"),
    ("sm_80", "fp32", "some", "project"),
    ("gfx942", "bf16", "many", "outer"),
    ("sm_90", "bf16", "few", "add_slots"),
]


@pytest.mark.parametrize(("target", "dtype", "load", "kernel"), CASES)
def test_it_fits(target: str, dtype: str, load: str, kernel: str) -> None:
    made = next(x for x in launches(FAMILY, load, dtype, target) if x.name == kernel)
    found = judge_launch(FAMILY, made, load, dtype, target)
    assert found.faults == ()
    assert found.exempt == ()


def test_every_kernel_is_compiled() -> None:
    assert {kernel for *_, kernel in CASES} == set(kernel_names(launch))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_is_launched(target: str, load: str) -> None:
    """Blocks have as many rows as the plan's, and one row of an expert needs no more than 16."""
    for dtype in (torch.float32, torch.float16):
        with recorded(target, launch) as made:
            start(LOADS[load], dtype, layout="interleaved", activation_text="swiglu(alpha=1.5, limit=3.0)")
        assert len({x.given["BM"] for x in made if x.name in ("project", "activate")}) == 1
        for x in made:
            if x.name == "add_slots":
                continue
            assert x.given["PRECISION"] == ("tf32x3" if dtype == torch.float32 and target == "sm_90" else "ieee")
            assert x.given["BM"] == 16 or load != "few" or x.name == "outer"
            if x.name == "activate":
                assert (x.given["NAME"], x.given["A"], x.given["B"]) == ("swiglu", 1.5, 3.0)
                assert (x.given["w"].row, x.given["w_up"].row) == (2048, 2048)  # every second row
