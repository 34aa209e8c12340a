"""Rows that differ only in the number of their layer, as one: ``model.layers.[0-63].self_attn``, 64 times."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from gatecc.report.findings import Findings
from gatecc.report.rows import EffectRow, LoweringRow, RewriteRow

Row = TypeVar("Row")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.#@])")  # a whole component of an FQN or key


@dataclass(frozen=True)
class Group(Generic[Row]):
    """Rows that are alike; ``place`` names all of them."""

    place: str
    rows: tuple[Row, ...]

    @property
    def size(self) -> int:
        return len(self.rows)


def group(rows: Iterable[Row], place: Callable[[Row], str], like: Callable[[Row], Hashable]) -> list[Group[Row]]:
    """Group rows whose place has the same shape and whose ``like`` is equal, in the order of their first member."""
    found: dict[tuple[str, Hashable], list[Row]] = {}
    for row in rows:
        found.setdefault((_NUMBER.sub("*", place(row)), like(row)), []).append(row)
    return [Group(_together([place(row) for row in members]), tuple(members)) for members in found.values()]


def effects_of(rewrites: Iterable[RewriteRow]) -> list[Group[EffectRow]]:
    """What rewrites did to weights; ``place`` is the whole text."""
    rows = [effect for row in rewrites for effect in row.effects]
    return group(rows, lambda effect: effect.text, lambda _: None)


def grouped_lowerings(report: Findings, *, lowered: bool) -> list[Group[LoweringRow]]:
    """The places that a compilation lowered, or those that it left alone."""
    rows = [row for row in report.lowered if bool(row.became) is lowered]
    return group(rows, lambda r: r.owner, lambda r: (r.lowering, r.found, r.became, r.reason, r.gain))


def compiled_text(report: Findings) -> str:
    """A compilation in one line: ``2 graphs, 1 break; 4 places lowered, 1 left alone``."""
    lowered = sum(bool(row.became) for row in report.lowered)
    graphs, breaks = len(report.graphs), len(report.breaks)
    parts = f"{graphs} graph{'s' * (graphs != 1)}, {breaks} break{'s' * (breaks != 1)}"
    return f"{parts}; {lowered} place{'s' * (lowered != 1)} lowered, {len(report.lowered) - lowered} left alone"


def _together(places: list[str]) -> str:
    """One name for places of the same shape: numbers that vary become ranges."""
    columns = list(zip(*(_NUMBER.findall(place) for place in places), strict=True))
    ranges = iter([_ranges(sorted({int(text) for text in column})) for column in columns])
    return _NUMBER.sub(lambda _: next(ranges), places[0])


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``[0-2,5]``; a single number stays as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "[" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) + "]"
