"""What ``gatecc export`` shows: the stage it is in, then what was lowered, what was not and why."""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gatecc.export import Exported
from gatecc.export.progress import watched

OnnxTarget = Annotated[
    Literal["ort", "portable", "opset27"],
    typer.Option("--target", help="With operators of ONNX Runtime, standard ones alone, or those of opset 27."),
]
Opset = Annotated[int | None, typer.Option("--opset", help="Of the standard operators, 18 to 25, by default 24.")]
Decode = Annotated[bool, typer.Option("--decode", help="Write decode.onnx, the step of generation, too.")]
Bits = Annotated[str | None, typer.Option("--quantize", help="Fewer bits: w8, w4, int8, fp16; fp4 only tells.")]
Evaluation = Annotated[
    str | None, typer.Option("--evaluation", metavar="MODULE:FACTORY", help="Inputs to measure --quantize on.")
]
Tokenizer = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="FOLDER", help="Write this tokenizer beside the graph, too.")
]
Functions = Annotated[
    bool, typer.Option("--functions", help="Rewrites and operators as calls of functions that bear their names.")
]
_STAGES = 4  # of an export that gives up no size: more are shown as they come


@contextmanager
def export_progress(more: int) -> Generator[None]:
    """A bar on standard error, if someone is there to see it. ``more``: stages beside those of every export."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield
        return
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task, begun = bar.add_task("", total=_STAGES + more), 0

        def told(name: str) -> None:
            nonlocal begun
            bar.update(task, description=name, completed=begun, total=max(_STAGES + more, begun + 1))
            begun += 1

        with watched(told):
            yield


def summary(made: Exported) -> Group:
    """The record of an export, as tables."""
    facts = Table("file", "value", box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    for name, shapes in (("inputs", made.inputs), ("outputs", made.outputs)):
        facts.add_row(name, "  ".join(f"{n} ({', '.join(map(str, s))})" for n, s in shapes.items()))
    facts.add_row("nodes", f"{sum(made.operators.values())}, opset {made.opset}")
    if made.compared:
        worst = max(c.error for c in made.compared)
        facts.add_row("compared", f"at {len(made.compared)} sizes, largest difference {worst:.1e}")
    if made.decode is not None:
        told = made.decode.genai
        says = f"no: {told.refused}" if told.refused else "; ".join(("genai_config.json", *told.limits))
        facts.add_row("onnxruntime-genai", Text(says))
    if made.quantized is not None:
        facts.add_row(*_quantised(made))
    parts = [facts, *_counted("lowered to", made.lowered), *_counted("kept as it is", made.kept)]
    parts += _counted("calls of functions", made.functions)
    if made.quantized is not None:
        parts += _counted("not quantised", made.quantized.kept)
    return Group(*parts, *(Text(f"note: {note}", style="dim") for note in made.notes))


def _quantised(made: Exported) -> tuple[str, str]:
    told = made.quantized
    assert told is not None
    parts = [f"{told.bytes_after / max(told.bytes_before, 1):.2f}x the bytes"]
    parts += [f"{ratio:.2f}x the time at {sizes}" for sizes, ratio in told.time.items()]
    agreed = [a.agreement for a in told.accuracy if a.agreement is not None]
    parts += [f"argmax agreement {min(agreed):.3f}"] if agreed else []
    return told.options.form, f"{', '.join(parts)} (on {told.on})"


def _counted(title: str, counts: Mapping[str, int]) -> list[Table]:
    if not counts:
        return []
    table = Table(title, "", box=box.SIMPLE_HEAD, pad_edge=False)
    for text, count in counts.items():
        table.add_row(Text(text), str(count))
    return [table]
