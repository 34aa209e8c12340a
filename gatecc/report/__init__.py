"""What was found, changed, refused and measured: one object of plain data, shown as text, JSON or one HTML file."""

from gatecc.report.cost import RunCost, Spent, TakenRow
from gatecc.report.report import Report
from gatecc.report.rows import (
    BreakRow,
    EffectRow,
    GraphDump,
    GraphPair,
    LoweringRow,
    NodeRow,
    PassRow,
    RewriteRow,
    RungRow,
    SiteRow,
    Totals,
    environment,
)

__all__ = [
    "BreakRow",
    "EffectRow",
    "GraphDump",
    "GraphPair",
    "LoweringRow",
    "NodeRow",
    "PassRow",
    "Report",
    "RewriteRow",
    "RunCost",
    "RungRow",
    "SiteRow",
    "Spent",
    "TakenRow",
    "Totals",
    "environment",
]
