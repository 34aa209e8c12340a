"""Every activation, layout and combination of the GPU kernels, in Triton's interpreter, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gatecc.codegen.judge.interpreted import in_own_process

ROOT = Path(__file__).resolve().parents[4]
HALVES = ("bfloat16", "float16")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Case -> errors, accesses outside of the operands, and races."""
    return in_own_process("tests.ops.moe_ffn.triton.interpreted", ROOT)


def test_values_and_gradients(found: dict[str, Any]) -> None:
    worst = {
        case: max(x["errors"].items(), key=lambda pair: pair[1]) for case, x in found.items() if case not in HALVES
    }
    assert len(worst) == 7
    assert {case: pair for case, pair in worst.items() if pair[1] > 2e-6} == {}


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(found: dict[str, Any], dtype: str) -> None:
    assert max(found[dtype]["errors"].values()) < 4  # units of what the dtype resolves


@pytest.mark.parametrize("kind", ["outside", "raced"])
def test_nothing_outside_is_touched_and_nothing_written_twice(found: dict[str, Any], kind: str) -> None:
    assert {case: x[kind] for case, x in found.items() if x[kind]} == {}
