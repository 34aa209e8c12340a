"""What the commands share: their arguments, loading and transforming a model, messages and errors."""

from __future__ import annotations

import sys
import traceback as tracebacks
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text
from torch import nn

import gatecc
from gatecc.cli.reference import load_model, load_recipe, parse_options
from gatecc.cli.signals import ended_cleanly
from gatecc.errors import ArgumentError, GateccError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY",
        help="A factory (or a model) in a module or in a .py file; it returns a model, or (model, example_inputs).",
        show_default=False,
    ),
]
Inputs = Annotated[
    str | None,
    typer.Option("--inputs", metavar="MODULE:FACTORY", help="Example inputs: a tuple, a dict or (tuple, dict)."),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe", "-r", help="A name from `gatecc recipes`, or module:name of your own.", show_default=False
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="An option of the recipe; may be repeated.")
]
Reports = Annotated[
    list[Path] | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Write the report (.html, .json, .txt) or the graph (.graphml, .dot); repeatable.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")]


def transformed(
    model: str,
    inputs: str | None,
    recipe: str,
    settings: list[str] | None,
    scope: Literal["auto", "model"],
    verify: bool,
) -> tuple[nn.Module, Any, nn.Module]:
    """The rewritten model, the example inputs, and the model of before."""
    if ":" not in recipe:  # a wrong name is told before minutes of loading
        load_recipe(recipe, parse_options(settings or []))
    with status("loading the model"):
        loaded, example = load_model(model, inputs)
    wanted = load_recipe(recipe, parse_options(settings or []))
    with status(f"applying {recipe}"):
        return gatecc.transform(loaded, wanted, example, scope=scope, verify=verify), example, loaded


def chosen_model(
    model: str, inputs: str | None, recipe: str | None, settings: list[str] | None, checkpoint: Path | None
) -> tuple[nn.Module, Any]:
    """A model as it is, rewritten by a recipe, or from a checkpoint; and its example inputs."""
    if recipe and checkpoint:
        raise ArgumentError(
            "a checkpoint has its own recipe", found="--recipe and --checkpoint", expected="one of them"
        )
    if recipe:
        return transformed(model, inputs, recipe, settings, "auto", True)[:2]
    with status("loading the model"):
        chosen, example = load_model(model, inputs)
    if checkpoint:
        with status("loading the checkpoint"):
            chosen = gatecc.load(chosen, checkpoint)
    return chosen, example


def stdout() -> Console:
    return Console(file=sys.stdout)


def say(text: str, style: str = "dim") -> None:
    Console(file=sys.stderr).print(Text(text, style=style))


@contextmanager
def status(text: str) -> Generator[None]:
    """A moving line on standard error while something long runs, if someone is there to see it."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield
        return
    with console.status(f"{text} …"):
        yield


@contextmanager
def errors(traceback: bool) -> Generator[None]:
    """A GateccError as its own text and exit code 2; anything else is a fault of gatecc and stays a traceback."""
    try:
        with ended_cleanly():
            yield
    except GateccError as error:
        if traceback:
            tracebacks.print_exc(file=sys.stderr)
        say(str(error), "red")
        raise typer.Exit(2) from error
