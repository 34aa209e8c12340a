"""The page on extending keeps its word: so many files for each kind of thing, and none of gatecc is touched.

That they work is shown by running the page (tests/test_docs.py).
"""

from __future__ import annotations

import re

from tests.test_docs import blocks
from tools import docs

PAGE = docs.DOCS / "extending.md"
FILES = {"A recipe": 1, "A rewrite": 1, "An operator": 1, "An operator that leaves work out": 1, "A kind of site": 3}


def test_each_thing_is_so_many_files() -> None:
    sections = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    found = {title: re.findall(r"^```python file=(\S+)$", body, re.MULTILINE) for title, body in _pairs(sections[1:])}
    assert {title: len(files) for title, files in found.items()} == FILES
    packages = [{file.split("/")[0] for file in files} for files in found.values()]
    assert all(len(names) == 1 and not names & {"gatecc", "tests"} for names in packages)


def test_what_is_written_is_also_used() -> None:
    """Each package is imported by a block behind it."""
    names = {block.meant.removeprefix("file=").split("/")[0] for block in blocks(PAGE) if "file=" in block.meant}
    run = "\n".join(block.code for block in blocks(PAGE) if not block.meant)
    assert all(re.search(rf"^(import|from) {name}\b", run, re.MULTILINE) for name in names)


def _pairs(parts: list[str]) -> list[tuple[str, str]]:
    return list(zip(parts[::2], parts[1::2], strict=True))
