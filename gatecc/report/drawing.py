"""A graph before and after as two SVG drawings with every node in the same place, and the change as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from xml.etree import ElementTree

from gatecc.report.diff import Box, Diff, Edge, State, diffs, region
from gatecc.report.layout import Layout, Point, layout
from gatecc.report.rows import GraphPair, NodeRow

WIDTH, HEIGHT = 176.0, 42.0  # of a box
STEP = 68.0  # from layer to layer
GAP = 18.0
LETTERS = 25  # that fit into a box
FRAME = (620.0, 620.0)  # the first view: the change at a readable size

_MARK: dict[State, str] = {"added": "+", "removed": "−", "rewired": "~", "same": " ", "fold": " "}
Side = Literal["before", "after"]


@dataclass(frozen=True)
class Panel:
    """One drawing. ``view`` is the first view box, ``whole`` the one that shows everything."""

    title: str
    svg: str
    view: str
    whole: str


@dataclass(frozen=True)
class Picture:
    """All there is to see of one pair of graphs."""

    scopes: tuple[str, ...]
    panels: tuple[Panel, ...]
    lines: tuple[tuple[str, str], ...]  # state and text of each changed node
    nodes: tuple[int, int | None]  # in the graphs, parameters not counted
    omitted: int

    @property
    def changed(self) -> int:
        return len(self.lines)


def picture(pair: GraphPair) -> Picture:
    """Compare, cut down, lay out and draw a pair of graphs."""
    wholes = diffs(pair)
    parts = [region(whole) for whole in wholes]
    sides: list[Side] = ["before"] if pair.after is None else ["before", "after"]
    panels = [_panel(part, side) for part, side in zip(parts if len(parts) > 1 else parts * 2, sides, strict=False)]
    lines = dict.fromkeys((box.state, line(box)) for whole in wholes for box in whole.changed)
    counts = [_count(dump.nodes) for dump in (pair.before, pair.after) if dump is not None]
    return Picture(
        pair.scopes,
        tuple(panels),
        tuple(lines),
        (counts[0], counts[1] if len(counts) > 1 else None),
        max(part.omitted for part in parts),
    )


def line(box: Box) -> str:
    """A node as a line of code: ``mul = aten.mul.Tensor(linear, sigmoid)  # 2x8 float32, model.py:7``."""
    row = box.row
    remarks = ", ".join(filter(None, (f"{row.dtype} {row.shape}".strip(), row.inserted_by, row.owner, row.line)))
    return f"{_MARK[box.state]} {row.name} = {row.target}({', '.join(row.inputs)})" + f"  # {remarks}" * bool(remarks)


def _count(nodes: tuple[NodeRow, ...]) -> int:
    return sum(node.op == "call_function" for node in nodes)


def _panel(part: Diff, side: Side) -> Panel:
    places = layout(part.graph(), WIDTH + GAP, GAP, STEP)
    edges = part.before if side == "before" else part.after
    absent: State = "added" if side == "before" else "removed"
    boxes = [box for box in part.boxes.values() if box.state != absent]
    changed = {box.name for box in part.changed}
    canvas = ElementTree.Element("g")
    for edge in sorted(edges):
        canvas.append(_edge(edge, places, edge not in (part.after if side == "before" else part.before)))
    for box in boxes:
        canvas.append(_box(box, places.places[box.name]))
    whole = (-GAP, -GAP, places.width + 2 * GAP, places.height + 2 * GAP)
    text = ElementTree.tostring(canvas, encoding="unicode", method="html")
    view = _view([places.places[name] for name in part.boxes if name in changed], whole)
    title = "as captured" if part.before == part.after and not changed else side
    return Panel(title, text, _numbers(view), _numbers(whole))


def _view(points: list[Point], whole: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """The frame around the change, within what is drawn; at the top if nothing has changed."""
    width, height = min(max(whole[2], FRAME[0]), 1.35 * FRAME[0]), FRAME[1]
    xs, ys = [x for x, _ in points] or [whole[0] + whole[2] / 2], [y for _, y in points] or [0.0]
    top = (min(ys) + max(ys) - height) / 2
    if max(ys) - min(ys) > height - STEP:
        top = min(ys) - STEP  # more than fits: begin where it begins
    left = (min(xs) + max(xs) - width) / 2
    return _within(left, width, whole[0], whole[2]), _within(top, height, whole[1], whole[3]), width, height


def _within(start: float, length: float, outer: float, outer_length: float) -> float:
    """Move an interval as little as needed into another one; centre it if it is the longer one."""
    if length >= outer_length:
        return outer + (outer_length - length) / 2
    return min(max(start, outer), outer + outer_length - length)


def _numbers(box: tuple[float, ...]) -> str:
    return " ".join(f"{value:.0f}" for value in box)


def _edge(edge: Edge, places: Layout, only_here: bool) -> ElementTree.Element:
    route = places.routes[edge]
    first, last = route[0], route[-1]
    points = [(first[0], first[1] + HEIGHT / 2), *route[1:-1], (last[0], last[1] - HEIGHT / 2 - 5)]
    path = f"M{points[0][0]:.0f} {points[0][1]:.0f}" + "".join(_curve(a, b) for a, b in pairwise(points))
    return ElementTree.Element("path", {"class": "edge changed" if only_here else "edge", "d": path})


def _curve(a: Point, b: Point) -> str:
    """A curve that leaves and arrives vertically."""
    middle = (a[1] + b[1]) / 2
    return f"C{a[0]:.0f} {middle:.0f} {b[0]:.0f} {middle:.0f} {b[0]:.0f} {b[1]:.0f}"


def _box(box: Box, place: Point) -> ElementTree.Element:
    kind = {"placeholder": "end", "output": "end"}.get(box.row.op, "")
    group = ElementTree.Element("g", {"class": f"node {box.state} {kind}".rstrip()})
    group.set("transform", f"translate({place[0]:.0f} {place[1]:.0f})")
    _child(group, "title", "\n".join(_tooltip(box)))
    shape = {"x": -WIDTH / 2, "y": -HEIGHT / 2, "width": WIDTH, "height": HEIGHT, "rx": HEIGHT / 2 if kind else 6}
    ElementTree.SubElement(group, "rect", {key: f"{value:g}" for key, value in shape.items()})
    first, second = _label(box)
    _child(group, "text", _MARK[box.state].strip() + " " * (box.state != "same") + _fit(first), y="-3")
    _child(group, "text", _fit(second, LETTERS + 3), y="13", **{"class": "small"})
    return group


def _child(parent: ElementTree.Element, tag: str, text: str, **attributes: str) -> None:
    ElementTree.SubElement(parent, tag, attributes).text = text


def _label(box: Box) -> tuple[str, str]:
    row = box.row
    if box.state == "fold":
        return row.target, row.owner or "several modules"
    short = row.target.removeprefix("aten.").removeprefix("operator.").removesuffix(".default")
    name = row.name if row.op in ("placeholder", "output") else short
    return name, _parameters(box.weights) or row.shape


def _parameters(names: tuple[str, ...]) -> str:
    """``fc.weight, bias``: the last module of each name, said once."""
    words: list[str] = []
    module = ""
    for *owner, name in (weight.split(".") for weight in names):
        words.append(".".join([*owner[-1:], name]) if owner[-1:] != [module] else name)
        module = owner[-1] if owner else ""
    return ", ".join(words)


def _tooltip(box: Box) -> Iterator[str]:
    if box.state == "fold":
        yield f"{box.row.owner or 'several modules'}: {len(box.folded)} nodes"
        yield ", ".join(box.folded[:12]) + ", …" * (len(box.folded) > 12)
        return
    row = box.row
    yield f"{row.name} = {row.target}({', '.join(row.inputs)})"
    rows = (("value", f"{row.dtype} {row.shape}".strip()), ("parameters", ", ".join(box.weights)))
    rows += (("module", row.owner), ("source", row.line), ("inserted by", row.inserted_by))
    yield from (f"{label}: {text}" for label, text in rows if text)


def _fit(text: str, letters: int = LETTERS) -> str:
    """Long text loses its middle: names differ at their ends."""
    if len(text) <= letters:
        return text
    head = letters // 2
    return text[:head] + "…" + text[len(text) - (letters - head - 1) :]
