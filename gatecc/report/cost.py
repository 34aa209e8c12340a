"""Cost: what a run of a model took, beside what it would have taken with nothing left out."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gatecc.errors import ArgumentError
from gatecc.ir.files import write_atomic
from gatecc.report.codec import decode, encode
from gatecc.report.taken_picture import TakenRow as TakenRow
from gatecc.report.taken_picture import picture
from gatecc.report.units import si

_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = 48  # units whose shares fit into a line


@dataclass(frozen=True)
class Spent:
    """Per sample. ``seconds``: wall time, None if it was not measured."""

    flops: float
    bytes: float
    seconds: float | None = None


@dataclass(frozen=True)
class RunCost:
    """The cost of one run, per sample: of the path that ``ran``, and of the ``full`` one, with nothing left out.

    ``each``: the operations of every sample alone, if they were asked for. ``uncounted``: operators of others that have
    no formula, and count as none. ``accuracy`` and ``label`` are the caller's. ``print(cost)``, ``cost.to_json()``,
    ``cost.save("cost.json")``; ``cost.save("taken.png")`` draws which units were taken (matplotlib, extra ``viz``).
    """

    model: str
    samples: int
    ran: Spent
    full: Spent
    taken: tuple[TakenRow, ...] = ()
    each: tuple[float, ...] = ()
    uncounted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    label: str = ""
    accuracy: float | None = None

    @property
    def flops_share(self) -> float:
        """Operations that ran, by those of the full path; 1 for a model that has none."""
        return self.ran.flops / self.full.flops if self.full.flops else 1.0

    @property
    def bytes_share(self) -> float:
        """Bytes that were moved, by those of the full path."""
        return self.ran.bytes / self.full.bytes if self.full.bytes else 1.0

    @property
    def time_share(self) -> float | None:
        """Wall time by that of the full path; None if one of the two was not measured."""
        ran, full = self.ran.seconds, self.full.seconds
        return None if ran is None or not full else ran / full

    def to_json(self, indent: int | None = 1) -> str:
        """As strict JSON."""
        return json.dumps(encode(self), indent=indent, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> RunCost:
        """What ``to_json`` wrote. Raises ArgumentError for any other text."""
        try:
            return decode(RunCost, json.loads(text))
        except (TypeError, ValueError) as error:
            raise ArgumentError("this JSON is not the cost of a run", found=str(error)) from error

    def to_text(self, width: int = 120) -> str:
        """As plain text tables."""
        written = io.StringIO()
        Console(width=width, color_system=None, force_terminal=False, file=written).print(render(self))
        return written.getvalue()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it; the suffix decides the form: .json or .txt, or the picture of what was taken: .png, .svg, .pdf.

        Raises ArgumentError for another suffix, or a picture without matplotlib or without anything that was chosen.
        """
        suffix = Path(path).suffix.lower()
        if suffix in (".png", ".svg", ".pdf"):
            return write_atomic(path, picture(self.taken, suffix.removeprefix(".")))
        if suffix not in (".json", ".txt"):
            raise ArgumentError(
                "a cost cannot be written in this form", found=str(path), expected=".json, .txt, .png, .svg, .pdf"
            )
        return write_atomic(path, self.to_json() if suffix == ".json" else self.to_text())

    def __str__(self) -> str:
        return self.to_text().rstrip("\n")


def rows(cost: RunCost) -> tuple[tuple[str, str, str, str], ...]:
    """Name, what ran, all of it and the share, as text: operations, bytes, time."""
    quantities = (
        ("operations", "FLOP", cost.ran.flops, cost.full.flops, cost.flops_share),
        ("bytes moved", "B", cost.ran.bytes, cost.full.bytes, cost.bytes_share),
        ("wall time", "s", cost.ran.seconds, cost.full.seconds, cost.time_share),
    )
    return tuple(
        (name, _number(ran, unit), _number(full, unit), "–" if share is None else f"{share:.3f}")
        for name, unit, ran, full, share in quantities
    )


def _number(value: float | None, unit: str) -> str:
    if value is None or unit != "s":
        return si(None if value is None else round(value), unit)
    return f"{value * 1e3:.3g} ms"


def bars(shares: Sequence[float]) -> str:
    """Shares as a line of bars; of more units than fit, each bar is the mean of several."""
    if len(shares) > _SHOWN:
        edges = [round(i * len(shares) / _SHOWN) for i in range(_SHOWN + 1)]
        groups = [shares[a:b] for a, b in pairwise(edges)]
        shares = [sum(group) / len(group) for group in groups]
    return "".join("·" if not share else _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)] for share in shares)


def render(cost: RunCost) -> RenderableType:
    """The tables of a cost."""
    heading = f"{cost.label}: " * bool(cost.label) + f"{cost.model}, per sample of {cost.samples}"
    if cost.accuracy is not None:
        heading += f", accuracy {cost.accuracy:.4g}"
    sizes = _table("", "that ran", "everything", "share", numbers=("that ran", "everything", "share"))
    for row in rows(cost):
        sizes.add_row(*row)
    parts: list[RenderableType] = [Text(heading, style="bold"), sizes]
    if cost.each:
        ordered = sorted(cost.each)
        spread = " … ".join(si(round(ordered[i]), "FLOP") for i in (0, len(ordered) // 2, -1))
        parts.append(Text(f"each sample alone: {spread} (least, median, most)"))
    if cost.taken:
        table = _table("site", "unit", "n", "taken", "each of them", numbers=("n", "taken"))
        for row in cost.taken:
            table.add_row(row.site or "(model)", row.kind, str(len(row.counts)), f"{row.share:.1%}", bars(row.shares))
        parts += [Text(), table]
    if cost.uncounted:
        parts.append(Text(f"note  no formula for {', '.join(cost.uncounted)}: counted as none", style="yellow"))
    parts += [Text(f"note  {note}", style="yellow") for note in cost.notes]
    return Group(*parts)


def _table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column in numbers
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table
