"""The table of measured gains: complete, read between its lines, and never asked for more than there is."""

from __future__ import annotations

import json

import pytest
import torch

from gatecc.codegen.c.build import find_compiler
from gatecc.ops.attention.c import profit

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")


def test_every_kind_is_measured_on_every_cpu() -> None:
    table = json.loads(profit._TABLE.read_text(encoding="utf-8"))
    kinds = {f"{kind}{rest}" for kind in ("full", "causal", "masked") for rest in ("", ", training")}
    assert set(table) == {"avx2", "avx512"}
    for of_unit in table.values():
        assert {dtype: set(rows) for dtype, rows in of_unit.items()} == {"float32": kinds, "bfloat16": kinds}
        assert all(rows.keys() == of_unit["float32"]["full"].keys() for of in of_unit.values() for rows in of.values())


def test_between_two_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profit, "_gains", lambda *_: [(64, 0.5), (128, 1.5), (256, 2.0)])
    found = [profit.gain(torch.float32, "full", n, 4096) for n in (63, 64, 96, 128, 192, 256, 9999)]
    assert found == [0.0, 0.5, 1.0, 1.5, 1.75, 2.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_has_no_kernel_gains_nothing(dtype: torch.dtype) -> None:
    assert profit.gain(dtype, "causal", 1024, 1024) == 0
    assert profit.gain(torch.float32, "causal", 1, 1024) == 0
