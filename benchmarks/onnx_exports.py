"""ONNX exports of models of the zoo, plain and gated, and of every recipe, all with weights that matter.

``python benchmarks/onnx_exports.py [--check]``; ``GATECC_ONLY=llama`` limits it, ``GATECC_ZOO=all`` takes the whole
zoo. An export that returns has been compared with torch at batch 1 and 3 and at several
lengths; it is written twice. A refusal counts as right if it is a GateccError that names the operator and its line. New
parameters get random values: fresh gates do little and would hide an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from _table import Row, main

sys.path.insert(0, str(Path(__file__).parent.parent))

import gatecc
from tests.acceptance.onnx_exports import MODELS, RECIPES, Result, of_recipe, plain_and_gated
from tests.zoo.models import variants


def runs(only: str) -> Iterator[tuple[str, Result]]:
    """Every export, by its name."""
    for info in gatecc.recipes():
        name = f"{info.name} on {RECIPES.get(info.name, ('hf/llama-sdpa', {}))[0]}"
        if only in name:
            yield name, of_recipe(info.name)
    for name in [n for n, _ in variants()] if os.getenv("GATECC_ZOO") == "all" else MODELS:
        if only in name:
            yield from plain_and_gated(name)


def measure() -> Iterator[Row]:
    """One row an export while it runs, then the shares."""
    only = os.getenv("GATECC_ONLY", "")
    results: dict[str, Result] = {}
    for name, result in runs(only):
        results[name] = result
        mark = "ok" if result.right and result.error == result.error else "refused" if result.right else "WRONG"
        at = "/".join(map(str, result.batches)) or "-"
        figures = f"{result.seconds:6.1f} s  {result.error:8.1e}  {result.nodes:5d} nodes  batch {at:<5}"
        print(f"{mark:<8}{figures} {name}  {result.said}", flush=True)
    count = max(len(results), 1)
    written = sum(r.error == r.error for r in results.values())
    yield Row("exports tried", len(results))
    yield Row("written and compared", written / count)
    yield Row(
        "written, or refused by operator and line", sum(r.right for r in results.values()) / count, 1, at_most=False
    )
    yield Row("run at a batch of 1 and 3", sum(r.batches == (1, 3) for r in results.values()) / max(written, 1))
    yield Row("slowest", max((r.seconds for r in results.values()), default=0.0), 60, unit="s")
    yield Row("largest error", max((r.error for r in results.values() if r.error == r.error), default=0.0))


if __name__ == "__main__":
    main("onnx_exports", lambda: list(measure()))
