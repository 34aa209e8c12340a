"""Progress: which stage an export is in, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

_watching: list[Callable[[str], None]] = []


def stage(name: str) -> None:
    """Tell those who watch that this begins."""
    for told in _watching:
        told(name)


@contextmanager
def watched(told: Callable[[str], None]) -> Generator[None]:
    """``told`` hears of every stage meanwhile."""
    _watching.append(told)
    try:
        yield
    finally:
        _watching.remove(told)
