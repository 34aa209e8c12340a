"""What was found, changed, refused and measured: one object of plain data, shown as text, JSON or one HTML file."""

from gatecc.report.report import Report
from gatecc.report.rows import (
    EffectRow,
    GraphDump,
    GraphPair,
    NodeRow,
    PassRow,
    RewriteRow,
    RungRow,
    SiteRow,
    Totals,
    environment,
)

__all__ = [
    "EffectRow",
    "GraphDump",
    "GraphPair",
    "NodeRow",
    "PassRow",
    "Report",
    "RewriteRow",
    "RungRow",
    "SiteRow",
    "Totals",
    "environment",
]
