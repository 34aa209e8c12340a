from __future__ import annotations

from html.parser import HTMLParser
from xml.etree import ElementTree

from hypothesis import given

from gatecc.report import GraphPair, Report
from gatecc.report.drawing import LETTERS, _fit, picture
from tests.report.sample import gated_layer, reports


def nodes(svg: str) -> dict[str, tuple[str, str]]:
    """Title's first line -> (class, place) of each drawn node."""
    found: dict[str, tuple[str, str]] = {}
    for group in ElementTree.fromstring(svg).iter("g"):
        title = group.find("title")
        if title is not None and title.text:
            found[title.text.splitlines()[0].split(" =")[0]] = (group.get("class", ""), group.get("transform", ""))
    return found


def test_both_drawings_put_every_node_in_the_same_place() -> None:
    before, after = (nodes(panel.svg) for panel in picture(gated_layer(2)).panels)
    assert set(after) - set(before) == {"mul_0", "mul_1"}
    assert set(before) <= set(after)
    assert all(before[name][1] == after[name][1] for name in before)
    assert after["mul_0"][0] == "node added"
    assert after["add_0"][0] == "node rewired"


def test_edges_that_only_one_side_has_are_marked() -> None:
    before, after = (ElementTree.fromstring(panel.svg) for panel in picture(gated_layer(1)).panels)
    marked = [sum(path.get("class") == "edge changed" for path in side.iter("path")) for side in (before, after)]
    assert marked == [1, 2]


def test_the_change_is_also_text() -> None:
    found = picture(gated_layer(1))
    assert (
        "added",
        "+ mul_0 = aten.mul_0.default(relu_0, gate_0)  # float32 2x8, gate, layers.0, model.py:7",
    ) in found.lines
    assert found.nodes == (3, 4)


def test_an_inspection_has_one_drawing() -> None:
    (panel,) = picture(GraphPair(("",), gated_layer(1).before)).panels
    assert len(nodes(panel.svg)) == 5


def test_long_names_lose_their_middle() -> None:
    fitted = _fit("scaled_dot_product_fused_attention_overrideable")
    assert len(fitted) == LETTERS
    assert fitted.startswith("scaled")
    assert fitted.endswith("overrideable"[-8:])


@given(reports())
def test_any_names_can_be_drawn(report: Report) -> None:
    for pair in report.graphs:
        for panel in picture(pair).panels:
            HTMLParser().feed(panel.svg)
            assert len(panel.view.split()) == 4


def test_the_first_view_shows_the_change() -> None:
    for panel in picture(gated_layer(2)).panels:
        x, y, width, height = map(float, panel.view.split())
        for kind, place in nodes(panel.svg).values():
            left, top = (float(n) for n in place.removeprefix("translate(").removesuffix(")").split())
            if "added" in kind:
                assert x < left < x + width
                assert y < top < y + height
