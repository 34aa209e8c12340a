"""``gatecc cost``: what a run takes, and which exits, blocks, experts and channels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gatecc
from gatecc.cli.commands import app
from gatecc.cli.shared import (
    AsJson,
    Inputs,
    Model,
    Settings,
    Traceback,
    chosen_model,
    errors,
    say,
    status,
    stdout,
)
from gatecc.report.cost import render

Files = Annotated[
    list[Path] | None,
    typer.Option("--save", metavar="FILE", help="Write it: .json, .txt, or what was taken: .png, .svg; repeatable."),
]


@app.command()
def cost(
    model: Model,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Transform the model by this recipe first.")
    ] = None,
    settings: Settings = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="FOLDER", help="Load this checkpoint into the model first.")
    ] = None,
    inputs: Inputs = None,
    rounds: Annotated[int, typer.Option("--rounds", help="The time is the least of so many runs; 0: no time.")] = 5,
    each: Annotated[bool, typer.Option("--each", help="Count every sample alone, too.")] = False,
    files: Files = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Say what one run costs per sample, beside the same run with nothing left out, and which units it took."""
    with errors(traceback):
        chosen, example = chosen_model(model, inputs, recipe, settings, checkpoint)
        with status("running"):
            found = gatecc.cost(chosen, example, rounds=rounds, each=each)
        for path in files or []:
            found.save(path)
            say(f"cost: {path}")
        if as_json:
            typer.echo(found.to_json())
        else:
            stdout().print(render(found))
