"""What became of the ONNX exports of real models: a run kept as data, and the table of it in docs/export.md.

python benchmarks/onnx_exports.py models --into found.json; python -m tools.exports found.json; python tools/docs.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.marks import between, marks

KEPT = Path(__file__).parent.parent / "docs" / "figures" / "onnx_exports.json"
PART = "part"  # no model of anybody's


def with_exports(page: str) -> str:
    """The page with its table made anew."""
    return between(marks("exports"), page, "\n" + "\n".join(table()) + "\n\n")


def table() -> Iterator[str]:
    """The lines of docs/export.md."""
    if not KEPT.exists():
        yield "No run was kept so far."
        return
    data = json.loads(KEPT.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = [row for row in data["rows"] if row["kind"] != PART]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    written = [row for row in rows if row["became"] == "written"]
    yield f"{data['date']}, {versions}:"
    yield f"{len({row['name'] for row in rows})} models, {len(rows)} exports, {len(written)} of them written, compared"
    yield "and of the same bytes twice. The others are named below."
    yield ""
    yield "| kind | models | plain | gated | nodes | largest error |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of = [row for row in rows if row["kind"] == kind]
        good = [row for row in of if row["became"] == "written"]
        forms = [f"{_count(good, form)} of {_count(of, form)}" for form in ("plain", "gated")]
        nodes = sorted(row["nodes"] for row in good)
        names = sorted({_name(row) for row in of})
        error = max((row["error"] for row in good), default=0.0)
        span = f"{nodes[0]} to {nodes[-1]}" if nodes else ""
        yield f"| {kind} | {len(names)}: {', '.join(names)} | {forms[0]} | {forms[1]} | {span} | {error:.1g} |"
    others = [row for row in rows if row["became"] != "written" or row["batches"] != [1, 3]]
    if others:
        yield ""
    for row in others:
        yield f"- {_name(row)}, {row['form']}: {row['became']}. {' '.join(row['said'].split())}"


def _count(rows: list[dict[str, Any]], form: str) -> int:
    return sum(row["form"] == form for row in rows)


def _name(row: dict[str, Any]) -> str:
    for implementation in ("-sdpa", "-eager"):
        row = {**row, "name": row["name"].removeprefix("hf/").removesuffix(implementation)}
    return row["name"]


def main(file: str) -> None:
    """Keep a run. Exits with 1 if an export went wrong, and keeps nothing."""
    data = json.loads(Path(file).read_text(encoding="utf-8"))
    wrong = [f"{row['name']} {row['form']}: {row['said']}" for row in data["rows"] if row["became"] == "wrong"]
    if wrong:
        sys.exit("mend them first:\n" + "\n".join(wrong))
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
