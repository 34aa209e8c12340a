"""Every activation, layout and combination of the GPU kernels, in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest

from tests.ops.moe_ffn.triton.interpreted import CASES, run


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_accesses(name: str) -> None:
    found = run(name)
    limit = 4 if name in ("bfloat16", "float16") else 2e-6  # units of what the dtype, or TF32, resolves
    assert {what: error for what, error in found.errors.items() if error > limit} == {}
    assert found.findings.outside == []
    assert found.findings.raced == []
