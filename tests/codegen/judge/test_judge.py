"""The judge finds what it is there to find: one fault in a kernel, on GPUs of both makers and in the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gatecc.codegen.judge.compiled import TARGETS, Launch, Resources, compile_launch, faults, recorded
from gatecc.codegen.judge.interpreted import in_own_process
from tests.codegen.judge import kernels

ROOT = Path(__file__).resolve().parents[3]


def launched(target: str, *, wide: bool = False) -> Launch:
    """A launch of a product of 32 x 32, recorded on tensors without data."""
    x = torch.empty(32, 32, dtype=torch.bfloat16, device="meta")
    launcher: Any = kernels
    with recorded(target, kernels, ["product"]) as found:
        launcher.product[(1,)](x, x, torch.empty(32, 32, device="meta"), 0.5, WIDE=wide, N=32, num_warps=4)
    (made,) = found
    return made


@pytest.mark.parametrize("target", TARGETS)
def test_a_product_is_compiled_for_every_gpu(target: str) -> None:
    assert faults(compile_launch(launched(target), target), target) == []


def test_double_precision_is_found() -> None:
    for target in ("sm_90", "gfx942"):
        (fault,) = faults(compile_launch(launched(target, wide=True), target), target)
        assert "float64" in fault


def test_each_budget_is_held() -> None:
    right = Resources(registers=64, spills=0, shared=1024, threads=128, matrix=4, double=0)
    assert faults(right, "sm_80") == []
    for change, word in (
        ({"spills": 3}, "spilled"),
        ({"shared": 164 * 1024}, "shared memory"),
        ({"threads": 2048}, "threads"),
        ({"matrix": 0}, "matrix units"),
    ):
        (fault,) = faults(right._replace(**change), "sm_80")
        assert word in fault
    assert faults(right._replace(matrix=0), "sm_80", matrix=False) == []


def test_the_interpreter_is_watched() -> None:
    found = in_own_process("tests.codegen.judge.kernels", ROOT)
    assert found["right"] == {"outside": [], "raced": []}
    assert found["no mask"]["outside"] == ["load: 4 of 8", "store: 4 of 8"]
    assert found["bfloat16"] == [0, 0, 0]  # elements that differ from torch's
    assert found["overlap"] == {"outside": [], "raced": ["copied: 4 of 20 addresses"]}
