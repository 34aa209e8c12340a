"""Report: what an inspection or a transform found, changed, refused and measured."""

from __future__ import annotations

import html
import io
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import networkx as nx
from rich.console import Console

from gatecc.errors import ArgumentError
from gatecc.ir.files import write_atomic
from gatecc.ir.graphview import write_dot, write_graphml
from gatecc.report import page, text
from gatecc.report.codec import decode, encode
from gatecc.report.findings import VERSION, Findings


@dataclass
class Report(Findings):
    """Plain data; ``print(report)``, ``report.print()``, ``report.save("report.html")``.

    Sites and refusals are complete: every place that looked like a site is in one of the two lists.
    """

    SUFFIXES: ClassVar[tuple[str, ...]] = (".json", ".html", ".txt", ".graphml", ".dot")  # that ``save`` knows

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
        written = io.StringIO()
        console = Console(width=width, color_system=None, force_terminal=False, file=written)
        console.print(text.render(self, width))
        return written.getvalue()

    def to_html(self) -> str:
        """The report as one self-contained page."""
        return page.render(self)

    def to_networkx(self) -> nx.DiGraph[str]:
        """The captured graphs, after the rewrites if there were any, as one DiGraph.

        If there are several, names begin with the scope: ``layers.0.attn/mul`` (``layers.0.attn@1/mul`` for its second
        variant). Layers that share a structure are there once; ``report.graphs`` says which.
        """
        if len(self.graphs) == 1:
            return (self.graphs[0].after or self.graphs[0].before).to_networkx()
        seen = Counter[str]()
        result: nx.DiGraph[str] = nx.DiGraph()
        for pair in self.graphs:
            scope = pair.scopes[0] if pair.scopes else ""
            prefix = f"{scope}@{seen[scope]}/" if seen[scope] else f"{scope}/"
            seen[scope] += 1
            result = nx.union(result, (pair.after or pair.before).to_networkx(), rename=("", prefix))
        return result

    def print(self, console: Console | None = None) -> None:
        """Print tables that fit the terminal; without colour where the output is not one."""
        console = console or Console()
        console.print(text.render(self, console.width))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report; the suffix decides the form: .json, .html or .txt, or the graph alone: .graphml or .dot.

        Raises ArgumentError for another suffix.
        """
        suffix = Path(path).suffix.lower()
        if suffix not in self.SUFFIXES:
            accepted = ", ".join(self.SUFFIXES)
            raise ArgumentError("a report cannot be written in this form", found=str(path), expected=accepted)
        if suffix in (".graphml", ".dot"):
            return {".graphml": write_graphml, ".dot": write_dot}[suffix](self.to_networkx(), path)
        return write_atomic(path, {".json": self.to_json, ".html": self.to_html, ".txt": self.to_text}[suffix]())

    def __str__(self) -> str:
        return self.to_text().rstrip("\n")

    def _repr_html_(self) -> str:
        # In a frame: the page's styles must not leak into the notebook.
        source = html.escape(self.to_html(), quote=True)
        return f'<iframe title="gatecc report" srcdoc="{source}" style="width:100%;height:640px;border:0"></iframe>'
