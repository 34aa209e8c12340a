"""The pages are what the code says, their links lead somewhere, and their Python runs.

A block marked ``python`` runs in the namespace of its page, where ``model`` and ``example_inputs`` are a tiny
transformer.
After the word stands what is meant to happen: ``raises=GCC007``, ``refused=GCC132`` (by an inspection of ``model``),
``not-refused=GCC132``, ``left=GCC108`` (by an explanation) or ``not-left=GCC108``; ``file=NAME`` writes the block to a
file, which later blocks may import. A page with files registers names for good, so it runs in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import gatecc
from gatecc.ir.refusals import CAUSES
from tests.recipes.tiny import tiny
from tools import docs
from tools.refusal_examples import EXAMPLES

pytestmark = pytest.mark.timeout(600)  # a page captures a dozen models
PAGES = [docs.ROOT / "README.md", *sorted(docs.DOCS.rglob("*.md"))]
_BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!`)\]\(([^)#\s]+)[^)]*\)")


class Block(NamedTuple):
    """``meant``: the words after ``python``."""

    meant: str
    code: str


def blocks(page: Path) -> list[Block]:
    """The Python of a page, top to bottom."""
    return [Block(meant.strip(), code) for meant, code in _BLOCK.findall(page.read_text())]


CAUSAL = ("gam.md", "liger.md", "lolcats.md", "gated-delta-net.md")  # recipes for decoders


DEEP = ("context-gates.md", "timestep-windows.md")  # gate one layer by another; go around whole blocks


def namespace(page: Path | None = None) -> dict[str, Any]:
    """What every page may use. Examples of recipes show one layer: layers that share graphs are the guides' matter."""
    name = "" if page is None else page.name
    recipe = page is not None and page.parent.name == "recipes" and name not in DEEP
    torch.manual_seed(0)
    inputs = (torch.randn(2, 6, 16), torch.tensor([10, 500]))
    model = tiny(layers=1 if recipe else 2, causal=name in CAUSAL)
    return {"gatecc": gatecc, "torch": torch, "nn": nn, "model": model, "example_inputs": inputs}


def run(block: Block, names: dict[str, Any]) -> None:
    """Run a block; raises if something else happens than is meant to."""
    word, _, code = block.meant.partition("=")
    if word == "file":
        Path(code).parent.mkdir(parents=True, exist_ok=True)
        Path(code).write_text(block.code)
        return
    if word == "raises":
        with pytest.raises(gatecc.GateccError) as raised:
            exec(block.code, names)
        assert raised.value.code == code
        return
    exec(block.code, names)
    if word in ("refused", "not-refused"):
        refusals = gatecc.inspect(names["model"], names["example_inputs"]).refusals
        assert (code in {r.code for r in refusals}) == (word == "refused"), refusals
        return
    if word in ("left", "not-left"):
        reasons = [row.reason for row in gatecc.explain(names["model"], names["example_inputs"]).lowered]
        assert any(f"({code})" in reason for reason in reasons) == (word == "left"), reasons
        return
    assert not word, f"unknown: {block.meant}"


def test_generated_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_page_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(docs, "index", lambda: "# another")
    assert docs.main(["--check"]) == 1
    assert "stale: docs/README.md" in capsys.readouterr().out


def named(page: Path) -> str:
    return page.relative_to(docs.ROOT).as_posix()


WITH_CODE = [p for p in PAGES if blocks(p)]
GENERATED = [p for p in WITH_CODE if p.parent != docs.DOCS and p.parent != docs.ROOT]


@pytest.mark.broad(4)
@pytest.mark.parametrize("page", GENERATED, ids=named)
def test_the_example_of_a_generated_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)


@pytest.mark.parametrize("page", [p for p in WITH_CODE if p not in GENERATED], ids=named)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if any(block.meant.startswith("file=") for block in blocks(page)):
        own = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(docs.ROOT)))}
        code = f"import tests.test_docs as t; t.run_page(t.Path({str(page)!r}))"
        done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    run_page(page)


def run_page(page: Path) -> None:
    """Run the Python of a page, in the working directory."""
    names = namespace(page)
    for block in blocks(page):
        run(block, names)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    local = [link for link in _LINK.findall(page.read_text()) if not link.startswith(("http:", "https:"))]
    missing = [link for link in local if not (page.parent / link).exists()]
    assert not missing


def test_every_code_has_an_example() -> None:
    assert EXAMPLES.keys() == CAUSES.keys()
    for cls in docs.failures():
        assert {"Fails:", "Mended:"} <= {word for word in (cls.__doc__ or "").split() if word.endswith(":")}, cls.code


def test_a_block_that_fails_is_noticed() -> None:
    with pytest.raises(NameError):
        run(Block("", "nothing"), {})
    with pytest.raises(pytest.fail.Exception):
        run(Block("raises=GCC009", "pass"), {})
