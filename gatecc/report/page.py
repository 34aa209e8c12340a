"""The report as one HTML file that needs nothing else: styles, script and drawings are inside, nothing is fetched."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from gatecc.report.cost import bars, rows
from gatecc.report.curve import curve
from gatecc.report.drawing import picture
from gatecc.report.findings import Findings
from gatecc.report.grouping import compiled_text, effects_of, group, grouped_lowerings
from gatecc.report.units import change, error_text, si, worst


def render(report: Findings) -> str:
    """The whole page. Every text of the report is escaped by the template engine or by ElementTree."""
    return template("report.html").render(
        report=report,
        kinds=Counter(site.kind for site in report.sites),
        refusals=group(report.refusals, lambda r: r.owner, lambda r: (r.code, r.kind, r.reason, r.remedy)),
        rungs=group(report.rungs, lambda r: r.fqn, lambda r: (r.rung, r.reason)),
        compiled=compiled_text(report) if report.compiled else "",
        lowered=grouped_lowerings(report, lowered=True),
        alone=grouped_lowerings(report, lowered=False),
        effects=effects_of(report.rewrites),
        pictures=[picture(pair) for pair in report.graphs],
        sizes=_sizes(report),
        costs=[(cost, rows(cost), [(row, bars(row.shares)) for row in cost.taken]) for cost in report.costs],
        curve=curve(report.costs),
        compared=bool(report.rewrites) or any(pair.after is not None for pair in report.graphs),
        new=sum(sum(row.new_parameters.values()) for row in report.rewrites),
        error=report.totals.max_error
        if report.totals.max_error is not None
        else worst(r.error for r in report.rewrites),
        time=sum(row.ms for row in report.passes),
        longest=max((row.ms for row in report.passes), default=0.0) or 1.0,
    )


def _sizes(report: Findings) -> list[tuple[str, str, int | None, int | None]]:
    totals = report.totals
    rows = (
        ("Parameters", "", totals.parameters_before, totals.parameters_after),
        ("Active for a token", "", totals.active_before, totals.active_after),
        ("Operations", "FLOP", totals.flops_before, totals.flops_after),
        ("Bytes moved", "B", totals.bytes_before, totals.bytes_after),
    )
    return [row for row in rows if row[2] is not None or row[3] is not None]


@cache
def template(name: str) -> jinja2.Template:
    """A page of this package, with the filters that pages share; every text that is put in is escaped."""
    loader = jinja2.PackageLoader("gatecc.report", "template")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    filters: dict[str, Any] = {"si": si, "error": error_text, "change": change, "markup": Markup}
    environment.filters.update(filters)
    return environment.get_template(name)
