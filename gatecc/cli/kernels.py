"""The commands about kernels: ``gatecc kernels check``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gatecc.errors import GateccError

_COLUMNS = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
kernels = typer.Typer(help="GPU kernels, judged without a GPU.", no_args_is_help=True)


@kernels.callback()
def main() -> None:
    """GPU kernels, judged without a GPU."""


@kernels.command()
def check(
    summary: Annotated[bool, typer.Option("--summary", help="One line for each family and kernel.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="A family or a kernel; repeatable.")
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option("--target", metavar="NAME", help="sm_90, gfx942 ...; repeatable.")
    ] = None,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", metavar="NAME", help="fp32, bf16, fp16.")] = None,
    compiling: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile for the targets as well.")] = True,
    jobs: Annotated[int, typer.Option("--jobs", min=1, metavar="N", help="How many processes do the work.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Run every kernel in Triton's interpreter and compile it for every target; exit code 0 if all hold their budgets.

    The interpreter's results are held against float64, and its accesses against the tensors that a kernel was given.
    What compilers write is held against budgets of registers, shared memory, float64, vectors and matrix units. A
    compilation takes a second the first time; what came of it is kept, and a check that was stopped goes on from there.
    """
    errors = Console(file=sys.stderr)
    try:
        from gatecc.codegen.judge.check import check as findings

        found: list[Any] = []
        with Progress(*_COLUMNS, console=errors, disable=not errors.is_terminal) as bar:
            task = bar.add_task("", total=None)
            chosen = (only or (), targets or (), dtypes or ())
            told = partial(_told, bar, task)
            for finding in findings(*chosen, compiling=compiling, processes=jobs, told=told):
                found.append(finding)
                for fault in finding.faults:
                    bar.console.print(Text(f"{place(finding)}: {fault}", style="red"), soft_wrap=True)
    except GateccError as error:
        errors.print(Text(str(error), style="red"))
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps([asdict(f) for f in found], indent=1))
    else:
        show(found, summary)
    raise typer.Exit(1 if any(f.faults for f in found) else 0)


def _told(bar: Progress, task: TaskID, done: int, of: int) -> None:
    bar.update(task, completed=done, total=of)
    if bar.disable and done * 20 // of > (done - 1) * 20 // of:  # a log has a line for every twentieth
        bar.console.print(f"{done} of {of}")


def place(finding: Any) -> str:
    """Where a finding belongs."""
    parts = ("family", "kernel", "case", "size", "dtype", "target")
    return ", ".join(value for part in parts if (value := getattr(finding, part, "")))


def show(found: Sequence[Any], summary: bool) -> None:
    """Print findings."""
    out = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    numbers = [f for f in found if hasattr(f, "case")]
    binaries = [f for f in found if not hasattr(f, "case")]
    if summary:
        rows = [_summed(name, numbers, "cases") for name in _names(numbers)]
        rows += [_summed(name, binaries, "binaries") for name in _names(binaries)]
        out.print(_table(("", "judged", "faults", "exempted, and why"), rows))
    else:
        out.print(_table(("family", "case", "dtype", "error", "ATen's", "allowed", "bytes"), map(_number, numbers)))
        head = "kernel size dtype target registers spills shared threads dots matrix float64 vector".split()
        out.print(_table((*head, ""), map(_binary, binaries)))
    faults = sum(bool(f.faults) for f in found)
    out.print(f"{len(numbers)} cases in the interpreter, {len(binaries)} binaries, {faults} with faults")


def _name(found: Any) -> str:
    return ": ".join(filter(None, (found.family, getattr(found, "kernel", ""))))


def _names(found: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(map(_name, found)))


def _summed(name: str, found: Sequence[Any], what: str) -> tuple[str, ...]:
    mine = [f for f in found if _name(f) == name]
    exempt = dict.fromkeys(why for f in mine for why in f.exempt)
    return (name, f"{len(mine)} {what}", str(sum(bool(f.faults) for f in mine)), "; ".join(exempt))


def _number(f: Any) -> tuple[str, ...]:
    worst = max(f.errors, key=lambda e: e.found / e.most, default=None)
    errors = (
        ("", "", "")
        if worst is None
        else (f"{worst.value} {worst.found:.1e}", f"{worst.eager:.1e}", f"{worst.most:.1e}")
    )
    ratio = max((t.ratio for t in f.traffic.values()), default=0.0)
    return (f.family, f.case, f.dtype, *errors, f"{ratio:.2f}")


def _binary(f: Any) -> tuple[str, ...]:
    numbers = ("",) * 8 if f.resources is None else tuple(map(str, f.resources))
    return (f.kernel, f.size, f.dtype, f.target, *numbers, "fault" if f.faults else "exempt" if f.exempt else "")


def _table(columns: Sequence[str], rows: Any) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
