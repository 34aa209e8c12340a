"""What is gated off must cost nothing: skipping forms against dense ones, on one CPU thread.

``python benchmarks/dynamic.py [SECTION ...] [--check]``; without names, all sections. A section is a file of its own,
``benchmarks/_dynamic_NAME.py``, with a function NAME that yields rows: one that is added is found by its file's name.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from _table import Row, main

PREFIX = "_dynamic_"


def sections() -> dict[str, Callable[[], Iterator[Row]]]:
    """The sections by name, in the order of their names."""
    names = sorted(path.stem.removeprefix(PREFIX) for path in Path(__file__).parent.glob(f"{PREFIX}*.py"))
    return {name: lambda name=name: getattr(importlib.import_module(PREFIX + name), name)() for name in names}


def measure(names: list[str]) -> Iterator[Row]:
    """The rows of the sections that are named, of all if none is."""
    for name, section in sections().items():
        if not names or name in names:
            torch.manual_seed(0)
            yield from section()


if __name__ == "__main__":
    chosen = [a for a in sys.argv[1:] if a in sections()]
    main("dynamic", lambda: list(measure(chosen)), [a for a in sys.argv[1:] if a not in chosen])
