"""alive: how many blocks of rows and columns a printed kernel holds at once, which decides how large they may be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NAMES = re.compile(r"\b[A-Za-z_]\w*")


def most_alive(lines: Sequence[str], tiles: Iterable[str]) -> int:
    """The largest number of values among ``tiles``, names of blocks, that are there before and needed after a line,
    and one for what the line itself computes."""
    names, first, last = set(tiles), dict[str, int](), dict[str, int]()
    for at, line in enumerate(lines):
        for name in names.intersection(_NAMES.findall(line)):
            first.setdefault(name, at if line.startswith(f"{name} = ") else -1)
            last[name] = at
    return 1 + max((sum(first[n] < at <= last[n] for n in first) for at in range(len(lines))), default=0)
