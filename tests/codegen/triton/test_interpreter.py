"""Every rule and option of the GPU kernels, in Triton's interpreter, against the recurrence in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
HALVES = ("bfloat16", "float16")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Case -> errors, and accesses outside of the operands."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.codegen.triton.interpreted"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_values_and_gradients(found: dict[str, Any]) -> None:
    worst = {
        case: max(x["errors"].items(), key=lambda pair: pair[1]) for case, x in found.items() if case not in HALVES
    }
    assert len(worst) == 12
    assert {case: pair for case, pair in worst.items() if pair[1] > 2e-6} == {}


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(found: dict[str, Any], dtype: str) -> None:
    errors = found[dtype]["errors"]
    assert max(errors.values()) < 4  # units of what the dtype, or TF32, resolves


def test_nothing_outside_is_touched(found: dict[str, Any]) -> None:
    assert {case: x["outside"] for case, x in found.items() if x["outside"]} == {}
