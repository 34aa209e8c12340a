"""Findings: what a report holds, as plain data. Text and page are written from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from gatecc.ir.site import Refusal
from gatecc.report.cost import RunCost
from gatecc.report.rows import (
    BreakRow,
    GraphPair,
    LoweringRow,
    PassRow,
    RewriteRow,
    RungRow,
    SiteRow,
    Totals,
    environment,
)

VERSION = 1  # of the JSON form; a reader refuses any other


@dataclass
class Findings:
    """Sites and refusals are complete: every place that looked like a site is in one of the two lists."""

    model: str = ""  # the class of the model
    recipe: str = ""  # empty for an inspection
    compiled: str = ""  # "inference" or "training": what `explain` compiled it for
    sites: list[SiteRow] = field(default_factory=list[SiteRow])
    refusals: list[Refusal] = field(default_factory=list[Refusal])
    rungs: list[RungRow] = field(default_factory=list[RungRow])
    rewrites: list[RewriteRow] = field(default_factory=list[RewriteRow])
    lowered: list[LoweringRow] = field(default_factory=list[LoweringRow])
    breaks: list[BreakRow] = field(default_factory=list[BreakRow])
    passes: list[PassRow] = field(default_factory=list[PassRow])
    graphs: list[GraphPair] = field(default_factory=list[GraphPair])
    costs: list[RunCost] = field(default_factory=list[RunCost])  # of runs, as the user appends them
    totals: Totals = field(default_factory=Totals)
    notes: list[str] = field(default_factory=list[str])
    environment: dict[str, str] = field(default_factory=environment)
    version: int = VERSION
