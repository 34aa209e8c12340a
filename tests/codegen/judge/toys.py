"""A family of one right kernel, as its package would hand it in, and ways to spoil it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.judge.family import Family
from tests.codegen.judge import scaled


def run(given: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": scaled.launch(given["x"], given.get("factor", 3.0), given.get("masked", True))}


def reference(given: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": given["x"] * 3.0}


FAMILY = Family(
    name="toy",
    launcher="tests.codegen.judge.scaled",
    cases={"odd": lambda: {"x": torch.randn(100, dtype=torch.float64)}},
    run=run,
    reference=reference,
    sizes={"2048": lambda dtype: scaled.launch(torch.empty(2048, dtype=dtype, device="meta"), 3.0, True)},
)
