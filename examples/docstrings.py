"""Real text that is on every machine: pairs from the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings", "idlelib", "lib2to3"}
LONGEST = 300  # characters of a description


class Pair(NamedTuple):
    """The first sentence of a docstring, and the paragraphs after it: two texts about the same thing."""

    summary: str
    description: str


def pairs(number: int, seed: int = 0) -> list[Pair]:
    """``number`` pairs, no text twice. Raises RuntimeError if the standard library is not there as source."""
    found: list[Pair] = []
    seen: set[str] = set()
    for pair in _pairs(seed):
        if not seen & set(pair):
            seen.update(pair)
            found.append(pair)
        if len(found) == number:
            return found
    raise RuntimeError(f"{len(found)} docstrings in {sysconfig.get_path('stdlib')}, {number} needed")


def _pairs(seed: int) -> Iterator[Pair]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(f for f in root.rglob("*.py") if not LEFT_OUT & set(f.relative_to(root).parts))
    random.Random(seed).shuffle(files)  # whole files, so that few must be parsed
    for file in files:
        yield from (pair for text in _docstrings(file) if (pair := _split(text)))


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # some files are broken on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            yield ast.get_docstring(node) or ""


def _split(docstring: str) -> Pair | None:
    summary, _, rest = docstring.partition("\n\n")
    pair = Pair(" ".join(summary.split()), " ".join(rest.split())[:LONGEST])
    enough = 4 <= len(pair.summary.split()) <= 40 and len(pair.description.split()) >= 8
    return pair if enough else None
