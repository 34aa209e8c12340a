"""Report: what an inspection or a transform found, changed, refused and measured."""

from __future__ import annotations

import html
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from rich.console import Console

from gatecc.errors import ArgumentError
from gatecc.ir.files import write_atomic
from gatecc.ir.site import Refusal
from gatecc.report.codec import decode, encode
from gatecc.report.rows import GraphPair, PassRow, RewriteRow, RungRow, SiteRow, Totals, environment

VERSION = 1  # of the JSON form; a reader refuses any other


@dataclass
class Report:
    """Plain data; ``print(report)``, ``report.print()``, ``report.save("report.html")``.

    Sites and refusals are complete: every place that looked like a site is in one of the two lists.
    """

    SUFFIXES: ClassVar[tuple[str, ...]] = (".json", ".html", ".txt")  # that ``save`` knows

    model: str = ""  # the class of the model
    recipe: str = ""  # empty for an inspection
    sites: list[SiteRow] = field(default_factory=list[SiteRow])
    refusals: list[Refusal] = field(default_factory=list[Refusal])
    rungs: list[RungRow] = field(default_factory=list[RungRow])
    rewrites: list[RewriteRow] = field(default_factory=list[RewriteRow])
    passes: list[PassRow] = field(default_factory=list[PassRow])
    graphs: list[GraphPair] = field(default_factory=list[GraphPair])
    totals: Totals = field(default_factory=Totals)
    notes: list[str] = field(default_factory=list[str])
    environment: dict[str, str] = field(default_factory=environment)
    version: int = VERSION

    def to_json(self, indent: int | None = 1) -> str:
        """The report as strict JSON."""
        return json.dumps(encode(self), indent=indent, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Report:
        """The report that ``to_json`` wrote.

        Raises ArgumentError if the text is no report, or one of another version.
        """
        remedy = "write it again with Report.save('report.json')"
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArgumentError("this is not JSON", found=str(error), do=remedy) from error
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION:
            raise ArgumentError("not a report of this version", found=f"{version}", expected=f"{VERSION}", do=remedy)
        try:
            return decode(Report, data)
        except (TypeError, ValueError) as error:
            raise ArgumentError("this JSON is not a report", found=str(error), do=remedy) from error

    def to_text(self, width: int = 120) -> str:
        """The report as plain text tables."""
        from gatecc.report.text import render

        text = io.StringIO()
        console = Console(width=width, color_system=None, force_terminal=False, file=text)
        console.print(render(self, width))
        return text.getvalue()

    def to_html(self) -> str:
        """The report as one self-contained page."""
        from gatecc.report.page import render

        return render(self)

    def print(self, console: Console | None = None) -> None:
        """Print tables that fit the terminal; without colour where the output is not one."""
        from gatecc.report.text import render

        console = console or Console()
        console.print(render(self, console.width))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report; the suffix decides the form: .json, .html or .txt.

        Raises ArgumentError for another suffix.
        """
        suffix = Path(path).suffix.lower()
        if suffix not in self.SUFFIXES:
            accepted = ", ".join(self.SUFFIXES)
            raise ArgumentError("a report cannot be written in this form", found=str(path), expected=accepted)
        write = dict(zip(self.SUFFIXES, (self.to_json, self.to_html, self.to_text), strict=True))[suffix]
        return write_atomic(path, write())

    def __str__(self) -> str:
        return self.to_text().rstrip("\n")

    def _repr_html_(self) -> str:
        # In a frame: the page's styles must not leak into the notebook.
        page = html.escape(self.to_html(), quote=True)
        return f'<iframe title="gatecc report" srcdoc="{page}" style="width:100%;height:640px;border:0"></iframe>'
