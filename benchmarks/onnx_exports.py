"""ONNX exports of real models of all kinds, plain and gated, and of every recipe, all with weights that matter.

    python benchmarks/onnx_exports.py models|recipes|zoo [--only llama] [--again] [--into found.json]

Each is a row of the file, written when it is known; what the file holds already is not run again, unless it went wrong
and ``--again`` asks for it. An export that returns has been compared with torch at batch 1 and 3 and at several
lengths; it is made twice. New parameters get random values: fresh gates do little and would hide an error. Exit code 1
if an export is wrong: no GateccError that names the operator and its line, or other bytes the second time.
``python -m tools.exports found.json; python tools/docs.py`` put a run into docs/export.md.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

sys.path.insert(0, str(Path(__file__).parent.parent))

import gatecc
from tests.acceptance.onnx_exports import MODELS, RECIPES, Result, of_case, of_recipe, plain_and_gated
from tests.acceptance.onnx_models import KINDS
from tests.zoo.models import variants

PACKAGES = ("torch", "transformers", "timm", "torchvision", "onnx", "onnxscript", "onnx-ir", "onnxruntime")
INTO = Path(__file__).parent / "results" / "onnx_exports.json"


def runs(what: str, name: str) -> Iterator[tuple[str, str, Result]]:
    """Kind, form and result of what bears this name."""
    if what == "recipes":
        yield f"recipe on {RECIPES.get(name, ('hf/llama-sdpa', {}))[0]}", "gated", of_recipe(name)
        for info in (info for info in gatecc.recipes() if info.name == name):
            for number, case in enumerate(info.cases):
                yield "recipe on its own case", f"case {number}", of_case(info, case)
    else:
        for form, result in plain_and_gated(name):
            yield KINDS.get(name, "zoo"), form, result


def keep(path: Path, data: dict[str, Any]) -> None:
    """Write the file as a whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def main(
    what: Annotated[str, typer.Argument(help="models, recipes or zoo")] = "models",
    only: Annotated[str, typer.Option(help="those whose names hold this")] = "",
    again: Annotated[bool, typer.Option(help="run what went wrong again")] = False,
    into: Annotated[Path, typer.Option(help="the file of the results")] = INTO,
) -> None:
    """Print and keep a row for each export."""
    torch.set_num_threads(1)
    data: dict[str, Any] = json.loads(into.read_text(encoding="utf-8")) if into.exists() else {"rows": []}
    data["date"] = datetime.date.today().isoformat()
    data["versions"] = {name: version(name) for name in PACKAGES}
    names = {
        "models": MODELS,
        "recipes": tuple(info.name for info in gatecc.recipes()),
        "zoo": tuple(name for name, _ in variants()),
    }[what]
    for name in names:
        rows = [row for row in data["rows"] if row["name"] == name]
        if only not in name or (rows and not (again and any(row["became"] == "wrong" for row in rows))):
            continue
        data["rows"] = [row for row in data["rows"] if row["name"] != name]
        for kind, form, result in runs(what, name):
            data["rows"].append({"name": name, "kind": kind, "form": form, **result._asdict()})
            figures = f"{result.seconds:6.1f} s  {result.error or 0:8.1e}  {result.nodes:5d} nodes"
            print(f"{result.became:<8}{figures}  {name} {form}  {result.said}", flush=True)
        keep(into, data)
    raise typer.Exit(int(any(row["became"] == "wrong" for row in data["rows"])))


if __name__ == "__main__":
    typer.run(main)
