"""alive: how many blocks of rows and columns a printed kernel holds at once, which decides how large they may be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NAMES = re.compile(r"\b[A-Za-z_]\w*")
_REDUCED = re.compile(r"\b(co)?sine\(")
_WITHIN = 5  # values that a sine holds while it reduces its argument, besides what it yields


def most_alive(lines: Sequence[str], tiles: Iterable[str]) -> int:
    """The largest number of values among ``tiles``, names of blocks, that are there before and needed after a line,
    and what the line itself computes."""
    names, first, last = set(tiles), dict[str, int](), dict[str, int]()
    for at, line in enumerate(lines):
        for name in names.intersection(_NAMES.findall(line)):
            first.setdefault(name, at if line.startswith(f"{name} = ") else -1)
            last[name] = at
    there = [sum(first[n] < at <= last[n] for n in first) for at in range(len(lines))]
    within = [_WITHIN if _REDUCED.search(line) else 0 for line in lines]
    return 1 + max((n + more for n, more in zip(there, within, strict=True)), default=0)
