"""The curve of accuracy against cost, as an SVG drawing for the page."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from gatecc.report.cost import RunCost

WIDTH, HEIGHT, LEFT, BELOW = 560.0, 260.0, 56.0, 34.0  # the margins hold the numbers
_ROOM = 0.08  # of the range, above and below the points


def curve(costs: Sequence[RunCost]) -> str:
    """Runs with an accuracy as points over the operations of a sample, joined from cheap to dear; "" for fewer than
    two."""
    runs = sorted((c for c in costs if c.accuracy is not None), key=lambda c: c.ran.flops)
    if len(runs) < 2:
        return ""
    right = max(max(c.full.flops, c.ran.flops) for c in runs) or 1.0
    heights = [float(c.accuracy or 0.0) for c in runs]
    low, high = min(heights), max(heights)
    room = (high - low) * _ROOM or 0.01
    low, high = low - room, high + room
    points = [
        (LEFT + c.ran.flops / right * (WIDTH - LEFT - 16), (HEIGHT - BELOW) * (1 - (y - low) / (high - low)))
        for c, y in zip(runs, heights, strict=True)
    ]
    g = ElementTree.Element("g")
    frame = f"M{LEFT:g} 0V{HEIGHT - BELOW:g}H{WIDTH:g}"
    ElementTree.SubElement(g, "path", d=frame, fill="none", stroke="currentColor", opacity="0.35")
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    ElementTree.SubElement(g, "polyline", points=line, fill="none", stroke="var(--accent)")
    for (x, y), run in zip(points, runs, strict=True):
        dot = ElementTree.SubElement(g, "circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="4", fill="var(--accent)")
        ElementTree.SubElement(
            dot, "title"
        ).text = f"{run.label or run.model}: {run.accuracy:.4g} at {run.flops_share:.1%}"
    for y, value in ((12.0, high), (HEIGHT - BELOW, low)):
        _text(g, LEFT - 6, y, f"{value:.3g}", "end")
    for share in (0.0, 0.5, 1.0):
        _text(g, LEFT + share * (WIDTH - LEFT - 16), HEIGHT - BELOW + 16, f"{share:.0%}", "middle")
    _text(g, (LEFT + WIDTH) / 2, HEIGHT - 2, "operations of a sample, by those of the full path", "middle")
    return "".join(ElementTree.tostring(child, "unicode") for child in g)


def _text(parent: ElementTree.Element, x: float, y: float, words: str, anchor: str) -> None:
    made = ElementTree.SubElement(parent, "text", x=f"{x:.1f}", y=f"{y:.1f}", fill="currentColor")
    made.set("text-anchor", anchor)
    made.set("font-size", "11")
    made.text = words
