from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatecc.ir.site import Refusal
from gatecc.report import EffectRow, GraphDump, GraphPair, Report, RewriteRow, SiteRow
from tests.report.sample import compiled_report, full_report, node, reports

VOID = {"meta", "input", "br", "link", "img", "path", "rect"}


class Page(HTMLParser):
    """Collects tags and text, and checks that they are nested properly."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_the_page_says_everything() -> None:
    page = Page(full_report().to_html())
    for word in (
        "TinyEncoder",
        "after gated-attention",
        "layers.2.attn#0",
        "causal+padding",
        "GCC104",
        "a softmax over experts",
        "select MLP sites instead",
        "identity_at_init(1e-06)",
        "2.0e-07",
        "5.1 MFLOP",
        "canonicalize",
        "use_cache was switched off",
        "data-dependent branch",
        "torch 2.14.1",
    ):
        assert word in page.text, word
    assert page.count("svg") == 3  # two drawings and the arrow head
    rows = [attrs for tag, attrs in page.tags if tag == "tr" and "data-kind" in attrs]
    assert len(rows) == 3


def test_the_page_of_a_compilation() -> None:
    page = Page(compiled_report().to_html())
    for word in ("compiled for training", "layers.[0-2].attn", "a causal <mask>", "half of the scores", "model.py:41"):
        assert word in page.text, word
    ids = {attrs.get("id") for _, attrs in page.tags}
    targets = {(attrs.get("href") or "")[1:] for tag, attrs in page.tags if tag == "a"}
    assert targets == {"lowered", "alone", "breaks", "graphs", "time"}
    assert targets <= ids


def test_nothing_is_fetched() -> None:
    text = full_report().to_html()
    for tag, attrs in Page(text).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "srcset", "xlink:href", "action", "data"} & set(attrs)
        assert (attrs.get("href") or "#").startswith("#")
    assert not re.search(r"https?:|//[a-z]|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert re.findall(r"url\([^)]*\)", text) == ["url(#tip)"]
    assert "default-src 'none'" in text


def test_links_lead_to_sections_that_exist() -> None:
    tags = Page(full_report().to_html()).tags
    ids = {attrs.get("id") for _, attrs in tags}
    targets = {(attrs.get("href") or "")[1:] for tag, attrs in tags if tag == "a"}
    assert targets == {"rewrites", "weights", "graphs", "sites", "refused", "capture", "time"}
    assert targets <= ids


def test_an_empty_report_is_a_page() -> None:
    page = Page(Report().to_html())
    assert "model" in page.text
    assert page.count("table") == 0


@pytest.mark.parametrize(("held", "word"), [(True, "held"), (False, "broken"), (None, "not checked")])
def test_the_verdict_is_said(held: bool | None, word: str) -> None:
    report = full_report()
    report.totals = type(report.totals)(contract="exact", contract_held=held)
    assert f"exact {word}" in Page(report.to_html()).text


HOSTILE = st.sampled_from(
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "</script><b>",
        "</style><b>",
        "' onload='x",
        "]]><b>",
        "<!--",
        "{{ 7 * 7 }}",
        "&lt;",
        "a<b>&c\"d'e",
    ]
)


@settings(max_examples=30, deadline=None)
@given(HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    calm, wild = (_everywhere(text).to_html() for text in ("name", name))
    shape = [(tag, sorted(attrs)) for tag, attrs in Page(calm).tags]
    assert [(tag, sorted(attrs)) for tag, attrs in Page(wild).tags] == shape
    assert Page(wild).text.count(name) >= 20


@settings(max_examples=30, deadline=None)
@given(reports())
def test_any_report_is_a_well_formed_page(report: Report) -> None:
    Page(report.to_html())


def test_a_notebook_shows_the_page_in_a_frame() -> None:
    (tag, attrs) = Page(full_report()._repr_html_()).tags[0]
    assert tag == "iframe"
    assert attrs["srcdoc"] == full_report().to_html()


def _everywhere(name: str) -> Report:
    """A report with the name in every place that holds text."""
    site = SiteRow(name, name, name, name, name, 0, (name,), name)
    refusal = Refusal(name, name, name, name, name, name)
    first = GraphDump((node(name, op="placeholder", target=name, owner=name),))
    second = GraphDump((*first.nodes, node(name + "2", name, target=name, owner=name, by=name)))
    report = Report(model=name, recipe=name, sites=[site], refusals=[refusal], environment={name: name})
    report.rewrites.append(RewriteRow(name, name, name, name, name, 0.0, {name: 1}, 0.0, (EffectRow(name, name, 1),)))
    report.graphs.append(GraphPair((name, name), first, second))
    report.notes.append(name)
    return report
