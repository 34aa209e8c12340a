"""The commands. Results go to standard output, progress and errors to standard error; exit code 2 means an error."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import gatecc
from gatecc.cli import exporting
from gatecc.cli.doctor import Finding, diagnose
from gatecc.cli.kernels import kernels
from gatecc.cli.reference import load_batches, load_model, parse_options
from gatecc.cli.shared import (
    AsJson,
    Inputs,
    Model,
    RecipeName,
    Reports,
    Settings,
    Traceback,
    chosen_model,
    errors,
    say,
    status,
    stdout,
    transformed,
)
from gatecc.errors import ArgumentError
from gatecc.report import Report
from gatecc.train import Transfer, Tune

app = typer.Typer(
    name="gatecc",
    help="Put gates, experts and linear attention into PyTorch models, verify them and export them to ONNX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(kernels, name="kernels")

ScopeName = Annotated[
    Literal["auto", "model"],
    typer.Option("--scope", help="auto: the smallest submodule that holds a site; model: one closed graph."),
]
OnlyNew = Annotated[bool, typer.Option("--only-new", help="Save only what the recipe added.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gatecc {metadata.version('gatecc')} (torch {metadata.version('torch')})")
        raise typer.Exit(0)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Put gates, experts and linear attention into PyTorch models, verify them and export them to ONNX."""


@app.command()
def inspect(
    model: Model,
    inputs: Inputs = None,
    reports: Reports = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Find the sites of a model and say why other places are none; change nothing."""
    with errors(traceback):
        _check_suffixes(reports or [])
        with status("loading the model"):
            loaded, example = load_model(model, inputs)
        with status("capturing and matching"):
            found = gatecc.inspect(loaded, example)
        _show(found, reports or [], as_json)


@app.command()
def explain(
    model: Model,
    inputs: Inputs = None,
    training: Annotated[bool, typer.Option("--training", help="Explain a step of training, not inference.")] = False,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="With sizes that may vary.")] = False,
    freeze: Annotated[bool, typer.Option("--freeze", help="With gatecc.freeze: weights may be packed.")] = False,
    reports: Reports = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Say what torch.compile(model, backend="gatecc") makes of a model: graphs, breaks, what is lowered, what not and
    why."""
    with errors(traceback):
        _check_suffixes(reports or [])
        with status("loading the model"):
            loaded, example = load_model(model, inputs)
        options = {"gatecc.freeze": True} if freeze else None
        with status("tracing and lowering"), torch.set_grad_enabled(training):
            found = gatecc.explain(loaded.train(training), example, options=options, dynamic=dynamic or None)
        _show(found, reports or [], as_json)


@app.command()
def transform(
    model: Model,
    recipe: RecipeName,
    settings: Settings = None,
    inputs: Inputs = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Save the result as a checkpoint.")
    ] = None,
    only_new: OnlyNew = False,
    keep_inputs: Annotated[
        bool, typer.Option("--keep-inputs", help="Save the example inputs themselves, not synthetic ones.")
    ] = False,
    scope: ScopeName = "auto",
    verify: Annotated[bool, typer.Option(help="Check the contracts numerically.")] = True,
    reports: Reports = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Rewrite a model by a recipe, verify it, report what was done, and save it."""
    with errors(traceback):
        _check_suffixes(reports or [])
        changed, _, _ = transformed(model, inputs, recipe, settings, scope, verify)
        _show(gatecc.last_report(changed), reports or [], as_json)
        if out is None:
            say("nothing is saved without --out FOLDER")
            return
        with status("saving"):
            gatecc.save(changed, out, only_new=only_new, example_inputs="keep" if keep_inputs else "synthetic")
        say(f"checkpoint: {out}")


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where model.onnx goes.", show_default=False)],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Transform the model by this recipe first.")
    ] = None,
    settings: Settings = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="FOLDER", help="Load this checkpoint into the model first.")
    ] = None,
    inputs: Inputs = None,
    target: exporting.OnnxTarget = "ort",
    opset: exporting.Opset = None,
    decode: exporting.Decode = False,
    quantize: exporting.Bits = None,
    evaluation: exporting.Evaluation = None,
    tokenizer: exporting.Tokenizer = None,
    external_data: Annotated[bool, typer.Option("--external-data", help="Weights in a file of their own.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", help="Stop after so many seconds of CPU time.")] = 600.0,
    group_experts: Annotated[
        bool, typer.Option(help='Write experts that are set to "batched_mm" as products by expert.')
    ] = True,
    functions: exporting.Functions = False,
    traceback: Traceback = False,
) -> None:
    """Write model.onnx after comparing it with torch, and say what was lowered and what not; if they differ nothing is
    written."""
    with errors(traceback):
        chosen, example = chosen_model(model, inputs, recipe, settings, checkpoint)
        options: dict[str, Any] = {"target": target, "opset": opset, "decode": decode, "quantize": quantize}
        options.update(timeout=timeout, group_experts=group_experts, external_data=external_data, tokenizer=tokenizer)
        options.update(functions=functions)
        samples = load_batches(evaluation) if evaluation else None
        with exporting.export_progress(decode + (quantize is not None)):
            made = gatecc.export(chosen, out, example, evaluation_inputs=samples, **options)
        Console(file=sys.stderr).print(exporting.summary(made))
        typer.echo(out)


@app.command()
def heal(
    model: Model,
    recipe: RecipeName,
    batches: Annotated[
        str,
        typer.Option("--batches", metavar="MODULE:FACTORY", help="Batches: an iterable.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the result goes.", show_default=False)],
    settings: Settings = None,
    transfer: Annotated[
        list[str] | None,
        typer.Option("--transfer", metavar="FIELD=VALUE", help="Stage 1, layer by layer: steps=100; repeatable."),
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option("--tune", metavar="FIELD=VALUE", help="Stage 2, the task: steps=100, distill=1; repeatable."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="FOLDER", help="Keep the run here, and go on with it.")
    ] = None,
    inputs: Inputs = None,
    only_new: OnlyNew = False,
    traceback: Traceback = False,
) -> None:
    """Rewrite a model by a recipe, train the result towards the model of before, and save it."""
    with errors(traceback):
        stages = {"transfer": _stage(Transfer, transfer), "tune": _stage(Tune, tune)}
        student, _, teacher = transformed(model, inputs, recipe, settings, "auto", True)
        done = gatecc.train.heal(student, teacher, load_batches(batches), **stages, checkpoint=checkpoint)
        for name in dict.fromkeys(point.stage for point in done.curve):
            losses = [point.loss for point in done.curve if point.stage == name]
            say(f"{name}: loss {losses[0]:.4g} -> {losses[-1]:.4g} in {len(losses)} steps")
        with status("saving"):
            gatecc.save(student, out, only_new=only_new)
        say(f"checkpoint: {out}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show one recipe with its options.", show_default=False)] = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """List the recipes, or describe one."""
    with errors(traceback):
        known = {info.name: info for info in gatecc.recipes()}
        if name is not None and name not in known:
            gatecc.recipe(name)  # raises the error that names the nearest ones
        chosen = [known[name]] if name is not None else list(known.values())
        if as_json:
            rows = [{**_public(info), "options": {k: repr(v) for k, v in info.options.items()}} for info in chosen]
            typer.echo(json.dumps(rows, indent=1))
        elif name is not None:
            _describe(chosen[0])
        else:
            rows = [(info.name, info.summary, info.citation) for info in chosen]
            stdout().print(_table(("recipe", "what it does", "from"), rows))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, which kernels and targets are usable, and what conflicts (then the exit code is 1)."""
    found = diagnose()
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
    else:
        stdout().print(_findings("Installed", found.installed), _findings("Usable", found.usable), sep="\n")
    for finding in found.conflicts:
        say(f"conflict: {finding.name} {finding.found}: {finding.remark}", "bold red")
    raise typer.Exit(1 if found.conflicts else 0)


def _stage(stage: type[Transfer] | type[Tune], settings: list[str] | None) -> Any:
    """A stage of healing from its settings, None without any."""
    if not settings:
        return None
    options = parse_options(settings)
    known = {f.name for f in fields(stage)}
    if unknown := sorted(set(options) - known):
        name = stage.__name__.lower()
        raise ArgumentError(f"--{name} has no field {', '.join(unknown)}", expected=", ".join(sorted(known)))
    try:
        return stage(**options)
    except TypeError as e:
        raise ArgumentError(f"--{stage.__name__.lower()} lacks something", found=str(e), expected="steps=N") from e


def _check_suffixes(paths: list[Path]) -> None:
    """Before minutes of work, not after."""
    for path in paths:
        if path.suffix.lower() not in Report.SUFFIXES:
            accepted = ", ".join(Report.SUFFIXES)
            raise ArgumentError("a report cannot be written in this form", found=f"--report {path}", expected=accepted)


def _show(report: Report, paths: list[Path], as_json: bool) -> None:
    for path in paths:
        report.save(path)
        say(f"report: {path}")
    if as_json:
        typer.echo(report.to_json())
    else:
        report.print(stdout())


def _public(info: Any) -> dict[str, Any]:
    return {"name": info.name, "summary": info.summary, "citation": info.citation}


def _describe(info: Any) -> None:
    out = stdout()
    doc = "\n\n".join(" ".join(paragraph.split()) for paragraph in info.doc.split("\n\n"))  # wrapped to the terminal
    out.print(Text(info.name, style="bold"), Text(info.citation, style="dim"), Text(), Text(doc), sep="\n")
    if info.options:
        out.print(_table(("option", "default"), [(k, repr(v)) for k, v in info.options.items()]))


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(Text(row[0], style="bold", no_wrap=True), *map(Text, row[1:]))
    return table


def _findings(title: str, findings: tuple[Finding, ...]) -> Table:
    style = {"ok": "green", "missing": "dim", "conflict": "bold red"}
    table = Table(title, "", "", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for finding in findings:
        state = Text(finding.state, style=style[finding.state])
        table.add_row(Text(finding.name), state, Text(finding.found), Text(finding.remark))
    return table
