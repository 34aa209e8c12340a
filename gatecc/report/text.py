"""The report as rich tables. Repeated layers share a row; the HTML and JSON forms list every site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from gatecc.report.cost import render as render_cost
from gatecc.report.findings import Findings
from gatecc.report.grouping import compiled_text, effects_of, group, grouped_lowerings
from gatecc.report.units import change, error_text, si, worst

WIDE = 112  # columns; a narrower terminal does not show source lines of sites


def render(report: Findings, width: int) -> RenderableType:
    """Everything that a terminal of ``width`` columns should show, empty parts left out."""
    return Stack(*_parts(report, width))


def _parts(report: Findings, width: int) -> Iterator[RenderableType]:
    yield _headline(report)
    sites = _sites(report, with_line=width >= WIDE)
    parts = (_lowered, _alone, _breaks, _refusals, _rewrites, _weights, _totals, _rungs, _passes)
    for table in (sites, *(part(report) for part in parts)):
        if table.row_count:
            yield Text()
            yield table
    if report.totals.contract:
        yield _verdict(report)
    for cost in report.costs:
        yield Text()
        yield render_cost(cost)
    for note in report.notes:
        yield Text(f"note  {note}", style="yellow")


def _headline(report: Findings) -> Text:
    words = Text(report.model or "model", style="bold")
    if report.recipe:
        words.append(f" after {report.recipe}", style="bold cyan")
    if report.compiled:
        return words.append(f" compiled for {report.compiled}\n{compiled_text(report)}", style="not bold")
    kinds = Counter(site.kind for site in report.sites)
    found = ", ".join(f"{number} {kind}" for kind, number in kinds.items()) or "none"
    return words.append(f"\n{len(report.sites)} sites: {found}; {len(report.refusals)} refused", style="not bold")


def _table(title: str, *columns: str, numbers: Iterable[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column in numbers
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def _sites(report: Findings, with_line: bool) -> Table:
    columns = ("kind", "owner", "n", "what it is", "line")[: 5 if with_line else 4]
    table = _table("Sites", *columns, numbers=("n",))
    table.columns[3].max_width = 24  # the names are what one reads first
    for like in group(report.sites, lambda s: s.owner, lambda s: (s.kind, s.mask, s.detail)):
        site = like.rows[0]
        what = ", ".join(filter(None, (site.mask, site.detail)))
        cells = (site.kind, like.place or "(model)", str(len(like.rows)), what, site.line)
        table.add_row(*map(Text, cells[: len(columns)]))
    return table


def _refusals(report: Findings) -> Table:
    table = _table("Refused", "code", "owner", "n", "found", "do", numbers=("n",))
    for like in group(report.refusals, lambda r: r.owner, lambda r: (r.code, r.kind, r.reason, r.remedy)):
        refusal = like.rows[0]
        place = _place(like.place, refusal.kind, refusal.line)
        cells = (str(len(like.rows)), refusal.reason, refusal.remedy)
        table.add_row(Text(refusal.code, style="yellow"), place, *map(Text, cells))
    return table


def _lowered(report: Findings) -> Table:
    table = _table("Lowered", "place", "n", "found", "became", "proof", "gain", numbers=("n",))
    for like in grouped_lowerings(report, lowered=True):
        row = like.rows[0]
        cells = (_place(like.place, row.lowering, row.line), str(len(like.rows)))
        table.add_row(*cells, *map(Text, (row.found, row.became, row.reason, row.gain)))
    return table


def _alone(report: Findings) -> Table:
    table = _table("Left alone", "place", "n", "found", "why", numbers=("n",))
    for like in grouped_lowerings(report, lowered=False):
        row = like.rows[0]
        cells = (_place(like.place, row.lowering, row.line), str(len(like.rows)))
        table.add_row(*cells, *map(Text, (row.found, row.reason)))
    return table


def _breaks(report: Findings) -> Table:
    table = _table("Graph breaks", "line", "why", "do")
    for row in report.breaks:
        table.add_row(*map(Text, (row.line, row.reason, row.remedy)))
    return table


def _place(owner: str, kind: str, line: str) -> Text:
    return Text(owner or "(model)").append(f"\n{kind} {line}".rstrip(), style="dim")


def _rewrites(report: Findings) -> Table:
    table = _table(
        "Rewrites", "rewrite", "site", "n", "contract", "error", "new", "ms", numbers=("n", "error", "new", "ms")
    )
    for like in group(report.rewrites, lambda r: r.site, lambda r: (r.rewrite, r.contract)):
        rows = like.rows
        cells = (
            rows[0].rewrite,
            like.place,
            str(len(rows)),
            rows[0].contract,
            error_text(worst(row.error for row in rows)),
            si(sum(sum(row.new_parameters.values()) for row in rows)),
            f"{sum(row.ms for row in rows):.1f}",
        )
        table.add_row(*map(Text, cells))
    return table


def _weights(report: Findings) -> Table:
    table = _table("Weights", "effect", "n", "new", numbers=("n", "new"))
    for like in effects_of(report.rewrites):
        table.add_row(Text(like.place), str(len(like.rows)), si(sum(row.new for row in like.rows)))
    return table


def _totals(report: Findings) -> Table:
    totals = report.totals
    sizes = (
        ("parameters", "", totals.parameters_before, totals.parameters_after),
        ("active for a token", "", totals.active_before, totals.active_after),
        ("operations", "FLOP", totals.flops_before, totals.flops_after),
        ("bytes moved", "B", totals.bytes_before, totals.bytes_after),
    )
    compared = any(after is not None for *_, after in sizes)
    columns = ("before", "after", "change") if compared else ("size",)
    table = _table("Totals", "", *columns, numbers=columns)
    for label, unit, before, after in sizes:
        cells = (si(before, unit), si(after, unit), change(before, after))
        if before is not None or after is not None:
            table.add_row(label, *cells[: len(columns)])
    return table


def _verdict(report: Findings) -> Text:
    verdicts = {True: ("held", "bold green"), False: ("broken", "bold red"), None: ("not checked", "dim")}
    error = error_text(report.totals.max_error)
    words = Text(f"\ncontract  {report.totals.contract} ").append(*verdicts[report.totals.contract_held])
    return words.append(f", largest error {error}" if error else "")


def _rungs(report: Findings) -> Table:
    table = _table("Capture", "module", "rung", "n", "why not higher", numbers=("n",))
    for like in group(report.rungs, lambda r: r.fqn, lambda r: (r.rung, r.reason)):
        cells = (like.place or "(model)", like.rows[0].rung, str(len(like.rows)), like.rows[0].reason)
        table.add_row(*map(Text, cells))
    return table


def _passes(report: Findings) -> Table:
    table = _table("Passes", "pass", "ms", "nodes", "", numbers=("ms", "nodes"))
    longest = max((row.ms for row in report.passes), default=0.0) or 1.0
    for row in report.passes:
        nodes = f"{row.nodes_before} → {row.nodes_after}" if row.nodes_before or row.nodes_after else ""
        bar = "█" * max(1, round(20 * row.ms / longest))
        table.add_row(Text(row.name), f"{row.ms:.1f}", nodes, Text(bar, style="cyan"))
    return table
