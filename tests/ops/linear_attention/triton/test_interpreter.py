"""Every rule and option of the GPU kernels, in Triton's interpreter, against the recurrence in float64."""

from __future__ import annotations

import pytest

from tests.ops.linear_attention.triton.interpreted import CASES, run


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_accesses(name: str) -> None:
    found = run(name)
    limit = 4 if name in ("bfloat16", "float16") else 2e-6  # units of what the dtype, or TF32, resolves
    assert {what: error for what, error in found.errors.items() if error > limit} == {}
    assert found.findings.outside == []
    assert found.findings.raced == []
