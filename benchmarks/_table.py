"""What every benchmark shares: CPU time of one thread, a table with the bar beside each figure, JSON, and --check.

Machines are shared and noisy: figures are ratios of process CPU times taken side by side in one run, best of several.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One figure. ``bar`` is the limit that it must keep (None: for information), ``at_most`` its direction."""

    what: str
    figure: float
    bar: float | None = None
    at_most: bool = True
    unit: str = ""

    @property
    def held(self) -> bool:
        """Whether the bar is kept."""
        if self.bar is None:
            return True
        return self.figure <= self.bar if self.at_most else self.figure >= self.bar


def cpu_seconds(work: Callable[[], object]) -> float:
    """Process CPU time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def best_of(*works: Callable[[], object], repeats: int) -> list[float]:
    """The least CPU time of each piece of work, all of them run in turn ``repeats`` times."""
    best = [float("inf")] * len(works)
    for _ in range(repeats):
        for i, work in enumerate(works):
            best[i] = min(best[i], cpu_seconds(work))
    return best


def stepping(decoder: Any, token: Any, state: Any) -> Callable[[], Any]:
    """A step of a decoder behind the last one, each time: a state that is stepped twice is copied. Its logits."""

    def step() -> Any:
        nonlocal state
        logits, state = decoder.step(token, state)
        return logits

    return step


def main(name: str, measure: Callable[[], Sequence[Row]], argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write ``benchmarks/results/NAME.json``; with --check exit 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=name)
    parser.add_argument("--check", action="store_true", help="exit non-zero when a bar is missed")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / f"{name}.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = list(measure())
    Console().print(_table(name, rows))
    _write(options.json, name, rows)
    if options.check and not all(row.held for row in rows):
        sys.exit(1)


def _table(name: str, rows: Sequence[Row]) -> Table:
    table = Table(title=name)
    for column in ("what", "figure", "bar", ""):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        bar = "" if row.bar is None else f"{'≤' if row.at_most else '≥'} {row.bar:g}"
        table.add_row(
            row.what,
            f"{row.figure:.4g} {row.unit}".strip(),
            bar,
            "" if row.bar is None else "ok" if row.held else "missed",
        )
    return table


def _write(path: Path, name: str, rows: Sequence[Row]) -> None:
    data = {"name": name, "torch": torch.__version__, "rows": [{**asdict(r), "held": r.held} for r in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)
