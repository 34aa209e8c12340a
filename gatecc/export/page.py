"""page: what an export did, as one HTML file that needs nothing else, and names no place and no date."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gatecc.export.compare import Compared
from gatecc.export.files import Exported
from gatecc.report.page import template
from gatecc.report.units import si

REPORT = "report.html"


def write_report(made: Path, model: str, result: Exported, versions: Mapping[str, str]) -> None:
    """Write ``report.html`` to the folder that holds the files of ``result``."""
    page = template("exported.html").render(
        model=model,
        versions=versions,
        notes=result.notes,
        tiles=list(_tiles(result)),
        tables=list(_tables(made, result)),
    )
    (made / REPORT).write_text(page)


def _tiles(result: Exported) -> Iterator[tuple[str, str, str]]:
    yield "Nodes", str(sum(result.operators.values())), f"opset {result.opset}, IR {result.ir_version}"
    if result.decode is not None:
        yield "Nodes of a step", str(sum(result.decode.operators.values())), "decode.onnx"
    yield "Lowered", str(sum(result.lowered.values())), f"{sum(result.kept.values())} kept as they are"
    worst = max((c.error for c in _compared(result)), default=None)
    yield (
        "Largest difference",
        "–" if worst is None else f"{worst:.1e}",
        "not compared" if worst is None else f"from torch, at {len(_compared(result))} sizes",
    )
    yield "Runtime", result.minimal_runtime or "–", "the oldest onnxruntime that is known to run it"


def _compared(result: Exported) -> tuple[Compared, ...]:
    return (*result.compared, *(() if result.decode is None else result.decode.compared))


def _tables(made: Path, result: Exported) -> Iterator[tuple[str, str, list[str], list[tuple[Any, ...]]]]:
    shapes = [(k, n, ", ".join(map(str, s))) for k, held in _ends(result) for n, s in held.items()]
    yield "Inputs and outputs", "Names are sizes that stay free.", ["", "Name", "Shape"], shapes
    yield "Lowered", "What became the node that computes it.", ["What", "Times"], _rows(result.lowered)
    yield "Kept", "What stays as the model spells it, and why.", ["What", "Times"], _rows(result.kept)
    differences = [(_sizes(c), f"{c.error:.1e}") for c in _compared(result)]
    lead = "The largest |torch - onnx| / max(1, max|torch|) over all outputs."
    yield "Compared", lead, ["Sizes", "Difference"], differences
    yield "Operators", "Nodes of model.onnx.", ["Operator", "Nodes"], _rows(result.operators)
    if result.functions:
        yield (
            "Functions",
            "Calls; runtimes put the nodes in their place.",
            ["Function", "Calls"],
            _rows(result.functions),
        )
    if result.quantized is not None:
        yield (
            "Not quantised",
            "Products that stay in float32, and why.",
            ["What", "Times"],
            _rows(result.quantized.kept),
        )
    files = [(name, digest, si((made / name).stat().st_size, "B")) for name, digest in result.files.items()]
    yield "Files", "SHA-256 and size.", ["Name", "SHA-256", "Size"], files


def _ends(result: Exported) -> Iterator[tuple[str, Mapping[str, Iterable[Any]]]]:
    yield "in", result.inputs
    yield "out", result.outputs
    if result.decode is not None:
        yield "step in", result.decode.inputs
        yield "step out", result.decode.outputs


def _rows(counts: Mapping[str, int]) -> list[tuple[Any, ...]]:
    return list(counts.items())


def _sizes(compared: Compared) -> str:
    return ", ".join(f"{name} {size}" for name, size in compared.sizes.items()) or "those of the example"
