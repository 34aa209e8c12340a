"""Each GPU kernel compiled for GPUs, without one, and held to what they can give it.

Here each on one or two targets, for experts of 1024 x 2816: compiling takes seconds. The rest is printed by
``python -m tests.ops.moe_ffn.triton.compiled``.
"""

from __future__ import annotations

import pytest
import torch

from gatecc.codegen.judge.compiled import compile_launch, faults
from tests.ops.moe_ffn.triton.compiled import KERNELS, LOADS, launches

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
CASES = [
    ("sm_90", BFLOAT16, "many", "activate"),
    ("sm_80", BFLOAT16, "few", "project"),
    ("sm_80", FLOAT32, "some", "project"),
    ("gfx942", BFLOAT16, "many", "outer"),
    ("sm_90", BFLOAT16, "few", "add_slots"),
]


@pytest.mark.parametrize(("target", "dtype", "load", "kernel"), CASES)
def test_it_fits(target: str, dtype: torch.dtype, load: str, kernel: str) -> None:
    made = next(x for x in launches(target, dtype, LOADS[load]) if x.name == kernel)
    assert faults(compile_launch(made, target), target, matrix=kernel != "add_slots") == []


def test_every_kernel_is_compiled() -> None:
    assert {kernel for *_, kernel in CASES} == set(KERNELS)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_is_launched(target: str, load: str) -> None:
    """Blocks have as many rows as the plan's, and one row of an expert needs no more than 16."""
    for dtype in (FLOAT32, torch.float16):
        made = launches(target, dtype, LOADS[load], layout="interleaved", activation="swiglu(alpha=1.5, limit=3.0)")
        assert len({x.given["BM"] for x in made if x.name in ("project", "activate")}) == 1
        for x in made:
            if x.name == "add_slots":
                continue
            assert x.given["PRECISION"] == ("tf32x3" if dtype == FLOAT32 and target == "sm_90" else "ieee")
            assert x.given["BM"] == 16 or load != "few" or x.name == "outer"
            if x.name == "activate":
                assert (x.given["NAME"], x.given["A"], x.given["B"]) == ("swiglu", 1.5, 3.0)
                assert (x.given["w"].row, x.given["w_up"].row) == (2048, 2048)  # every second row
