"""Section of dynamic.py: early exits of examples/early_exit.py on digits, five folds over all images."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from _table import Row

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples.early_exit import run, together


def exits() -> Iterator[Row]:
    """Accuracy, mean FLOPs and time of a ViT with exits, of those of the ViT without."""
    found = together([measured for measured, _ in run()])
    yield Row("exits, digits ViT: images", found.images)
    yield Row("exits, digits ViT: accuracy without", 100 * found.accuracy, unit="%")
    yield Row("exits: points of accuracy lost", 100 * (found.accuracy - found.dynamic), 0.5)
    yield Row("exits: mean FLOPs, of those without", found.flops, 0.6, unit="x")
    yield Row("exits: time at batch 1, of that without", found.single, 0.7, unit="x")
    yield Row("exits: time of a batch of a fifth, of that without", found.batch, unit="x")
