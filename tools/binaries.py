"""What compilers made of every kernel: a run of the judge summed up as data, and the table of it in docs/kernels.md.

gatecc kernels check --jobs 2 --json > found.json; python -m tools.binaries found.json; python tools/docs.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEPT = Path(__file__).parent.parent / "docs" / "figures" / "binaries.json"
FIELDS = ("registers", "spills", "shared")  # of Resources, whose first three they are
Found = list[dict[str, Any]]


def summed(found: Found) -> dict[str, Any]:
    """The most that a kernel takes on each target, over all sizes and dtypes, and why some took more than is usual."""
    import triton

    binaries = [f for f in found if f.get("resources")]
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for f in binaries:
        name = f["family"] if f["kernel"] == "kernel" else f"{f['family']}: {f['kernel']}"
        most = kernels.setdefault(name, {}).setdefault(f["target"], dict.fromkeys(FIELDS, 0))
        for field, value in zip(FIELDS, f["resources"], strict=False):
            most[field] = max(most[field], value)
    reasons = sorted({f"{f['family']}: {why}" for f in found for why in f["exempt"]})
    counts = {"cases": len(found) - len(binaries), "binaries": len(binaries), "faults": sum(map(_wrong, found))}
    return {"triton": triton.__version__, **counts, "kernels": kernels, "exempt": reasons}


def _wrong(finding: dict[str, Any]) -> bool:
    return bool(finding["faults"])


def table() -> Iterator[str]:
    """The lines of docs/kernels.md."""
    if not KEPT.exists():
        yield "No run was kept so far."
        return
    data = json.loads(KEPT.read_text(encoding="utf-8"))
    targets = list(dict.fromkeys(t for of in data["kernels"].values() for t in of))
    yield f"{data['cases']} cases in the interpreter, {data['binaries']} binaries, {data['faults']} with faults."
    yield f"Triton {data['triton']}. A kernel that was changed since then shows what it took."
    yield ""
    yield f"| kernel | {' | '.join(targets)} |"
    yield "|" + " --- |" * (len(targets) + 1)
    for name, of in data["kernels"].items():
        yield f"| {name} | {' | '.join(_cell(of.get(target)) for target in targets)} |"
    yield ""
    yield "More than is usual, and why:"
    yield ""
    yield from (f"- {reason}" for reason in data["exempt"])


def _cell(most: dict[str, int] | None) -> str:
    if most is None:
        return ""
    spills = f", {most['spills']} spills" if most["spills"] else ""
    return f"{most['registers']} / {most['shared'] / 1024:.3g}{spills}"


def main(file: str) -> None:
    """Keep a run. Exits with 1 if the judge found a fault, and keeps nothing."""
    data = summed(json.loads(Path(file).read_text(encoding="utf-8")))
    if data["faults"]:
        sys.exit(f"{data['faults']} faults: mend them first")
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
