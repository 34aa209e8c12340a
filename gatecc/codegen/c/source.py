"""C headers as one source: a library is kept under the hash of a single text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_LOCAL = re.compile(r'#include "(.+)"')


def amalgamated(headers: Iterable[Path]) -> str:
    """The text of headers with those that they include in the place of the includes, each once.

    Includes in quotes are relative to the header that has them, and take a line each; those of the system stay.
    """
    seen: set[Path] = set()
    return "".join(_opened(header.resolve(), seen) for header in headers)


def _opened(header: Path, seen: set[Path]) -> str:
    if header in seen:
        return ""
    seen.add(header)
    lines: list[str] = []
    for line in header.read_text(encoding="utf-8").splitlines(keepends=True):
        included = _LOCAL.match(line)
        if included is not None:
            lines.append(_opened((header.parent / included[1]).resolve(), seen))
        elif not line.startswith("#pragma once"):
            lines.append(line)
    return "".join(lines)
