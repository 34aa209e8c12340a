"""How much of a language model is left when its attention has become linear and was healed.

``python benchmarks/healing.py [--check]``. The conversions of examples/linearize_lm.py on the byte LM in the folder
that GATECC_BYTE_LM names (by default ../shared/models/stdlib-byte-lm beside the repository): held-out bits per byte
against the softmax teacher's, 30 windows of 512, with at most 0.75 M bytes of healing. Some twenty minutes of one core.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from _table import Row, main

from examples.linearize_lm import BUDGET, CONVERSIONS, Bytes, pretrained

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("GATECC_BYTE_LM", ROOT.parent / "shared" / "models" / "stdlib-byte-lm"))
BARS = {"liger": 1.015, "hybrid": 1.04, "gla": 1.15}


def measure() -> Iterator[Row]:
    """The rows of the benchmark."""
    if not (FOLDER / "config.json").exists():
        sys.exit(f"no model in {FOLDER}: set GATECC_BYTE_LM to the folder of the byte LM")
    data = Bytes()
    teacher = pretrained(FOLDER)
    level = data.bits(teacher)
    yield Row("softmax teacher", level, unit="bits per byte")
    for name, bar in BARS.items():
        torch.manual_seed(0)
        done = CONVERSIONS[name].heal(teacher, data, BUDGET, progress=True)
        yield Row(f"{CONVERSIONS[name].title}: healed / teacher", done.values[-1][1] / level, bar)
        for tokens, value in done.values:
            yield Row(f"    after {tokens:,} bytes", value / level)
        yield Row("    bytes used", done.tokens, 750_000)
        yield Row("    seconds", done.seconds, unit="s")


if __name__ == "__main__":
    main("healing", lambda: list(measure()))
