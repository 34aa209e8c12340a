"""Attention sites found against the cores that run, on the whole zoo or on variants whose name holds a word.

``python benchmarks/attention_sites.py [--check]``; ``GATECC_ZOO=llama`` limits it. Truth is observed while the eager
model runs (tests/zoo/truth.py). For scale, on 29 eager variants with 80 cores: Inductor's matcher finds 24, a 40-line
graph walk 77; on 17 of them with 46 cores ONNX Runtime's optimizer finds 2, onnxscript 28 (the measurements of the
project's facts, torch 2.14.1, not repeated here).
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from _table import Row, main

sys.path.insert(0, str(Path(__file__).parent.parent))

from gatecc.errors import CaptureError
from tests.acceptance.gates import inspected, truth_of
from tests.zoo.models import variants
from tests.zoo.spec import Spec


@dataclass
class Count:
    """Cores over some variants."""

    variants: int = 0
    architectures: int = 0
    ran: int = 0
    found: int = 0
    refused: int = 0
    false_hits: int = 0
    silent: int = 0
    uncaptured: int = 0


def add(count: Count, spec: Spec) -> None:
    """Count one variant."""
    case = spec.build()
    ran = Counter(core.owner for core in truth_of(case).cores)
    count.variants += 1
    count.ran += ran.total()
    try:
        report = inspected(case)
    except CaptureError:
        count.uncaptured += ran.total()
        return
    found = Counter(s.owner for s in report.sites if s.kind == "attention")
    refused = Counter(r.owner for r in report.refusals if r.kind in ("attention", "module"))
    count.found += (found & ran).total()
    count.false_hits += (found - ran).total()
    missed = ran - found
    count.refused += (missed & refused).total()
    count.silent += (missed - refused).total()
    if missed or found - ran:
        print(f"{spec.id}: ran {ran.total()}, missed {dict(missed)}, false {dict(found - ran)}", file=sys.stderr)


def measure() -> Iterator[Row]:
    """The rows of the benchmark."""
    word = os.environ.get("GATECC_ZOO", "").removeprefix("all")
    chosen = [spec for name, spec in variants() if word in name]
    count = Count(architectures=len({(s.family, s.name) for s in chosen}))
    for spec in chosen:
        add(count, spec)
    yield Row("architectures", count.architectures, 40, at_most=False)
    yield Row("variants", count.variants)
    yield Row("cores that ran", count.ran)
    yield Row("found, owner for owner", count.found)
    yield Row("missed with a reason", count.refused)
    yield Row("missed in silence", count.silent, 0)
    yield Row("false hits", count.false_hits, 0)
    yield Row("in variants that cannot be captured", count.uncaptured, 0)


if __name__ == "__main__":
    main("attention_sites", lambda: list(measure()))
