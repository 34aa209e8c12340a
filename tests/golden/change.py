"""The difference between two graphs as text: the lines around what changed, those that go and those that come.

  %act = gelu(%up)                       # b n 16 | mlp
- %down = linear(%act, @down, None)      # b n 8 | mlp.down
+ %gated = mul.Tensor(%act, %gate)       # b n 16 | mlp
+ %down = linear(%gated, @down, None)    # b n 8 | mlp.down
  %sum = add.Tensor(%x, %down)           # b n 8
...
  return %sum, %last
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from difflib import SequenceMatcher

_NAME = re.compile(r"%\w+")

Row = tuple[str, str]  # code and comment


def change(before: str, after: str, nested: Collection[str] = (), width: int = 0) -> str:
    """What is different after: empty if nothing is. ``nested``: nodes that may stand inside of the one that reads them,
    as an expression of up to ``width`` letters, where that one is among them too and no other reads them."""
    old, new = _rows(before), _nested(_rows(after), {f"%{name}" for name in nested}, width)
    rows = list(_lines(old, new))
    near = {at for at, (mark, _) in enumerate(rows) if mark.strip()}
    if not near:
        return ""
    shown = [at for at in range(len(rows)) if near & {at - 1, at, at + 1} and not _within(rows, at)]
    column = max((len(rows[at][1][0]) for at in shown if rows[at][1][1]), default=0)
    lines: list[str] = []
    for at, last in zip(shown, [shown[0] - 1, *shown], strict=False):
        if at > last + 1:
            lines.append(f"- ... {at - last - 1} lines" if rows[at][0] == rows[last][0] == "-" else "...")
        lines.append(_text(*rows[at], column))
    return "\n".join(lines)


def _within(rows: list[tuple[str, Row]], at: int) -> bool:
    """Whether a line is one of many that go, and neither the first nor the last of them: how many go says which."""
    return all(0 <= i < len(rows) and rows[i][0] == "-" for i in (at - 1, at, at + 1)) and any(
        all(0 <= i < len(rows) and rows[i][0] == "-" for i in part)
        for part in (range(at - 1, at + 3), range(at - 2, at + 2))
    )


def _rows(text: str) -> list[Row]:
    parts = (line.partition("  #") for line in text.splitlines())
    return [(code.strip(), comment.strip()) for code, _, comment in parts]


def _lines(old: list[Row], new: list[Row]) -> Iterator[tuple[str, Row]]:
    for tag, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            yield from ((" ", row) for row in old[i:j])
        else:
            yield from (("-", row) for row in old[i:j])
            yield from (("+", row) for row in new[k:m])


def _text(mark: str, row: Row, column: int) -> str:
    code, comment = row
    return f"{mark} {code:<{column}}  # {comment}" if comment else f"{mark} {code}"


def _nested(rows: list[Row], names: Collection[str], width: int) -> list[Row]:
    """The rows, in which a node that only one other of ``names`` reads, once, stands where it is read."""
    readers: dict[str, list[str]] = {}
    for code, _ in rows:
        reader, _, expression = code.rpartition(" = ")
        for name in _NAME.findall(expression):
            readers.setdefault(name, []).append(reader)
    inner: dict[str, str] = {}
    kept: list[Row] = []
    for code, comment in rows:
        name, _, expression = code.rpartition(" = ")
        expression = _NAME.sub(lambda m: inner.get(m[0], m[0]), expression)
        inside = name in names and len(readers.get(name, ())) == 1 and readers[name][0] in names
        if inside and len(expression) <= width:
            inner[name] = expression
        else:
            kept.append((f"{name} = {expression}" if name else expression, comment))
    return kept
