"""The main job, end to end: ``make demo``, or ``make demo ARGS='--model module:factory'`` for a model of yours.

Inspect a model, insert gates that change nothing, train only them, save, load, export to ONNX, compare, revert, report.
Each step prints what it measured. The exit code is 1 if a promised equality does not hold.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import gatecc
from examples.any_model import AnyModel, outputs
from examples.sentences import Sentences
from examples.task import Task

IDENTITY = 1e-6  # how far new gates may move an output
ONNX = 1e-4  # how far ONNX Runtime may be from torch: another order of sums over some layers
RATE = 2e-3

console = Console(highlight=False, soft_wrap=True)


class Demo:
    """The steps, numbered as they run, and the promises that were broken."""

    def __init__(self, task: Task, out: Path, seconds: float) -> None:
        self.task, self.out, self.seconds = task, out, seconds
        self.broken: list[str] = []
        self.number = 0
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """All of the steps."""
        found = self.inspect()
        gated = self.gate(found)
        before = self.task.similarities(gated)
        self.equal("new gates change nothing", self.task.model, gated, IDENTITY)
        self.train(gated)
        loaded = self.checkpoint(gated)
        self.export(loaded)
        self.equal("reverted", self.task.model, gatecc.revert(gated), 0.0)
        self.similarities(before, self.task.similarities(gated))
        self.report(gated)

    @contextmanager
    def step(self, name: str) -> Generator[list[str]]:
        """One line: the step, what it measured, the time that it took."""
        self.number += 1
        said: list[str] = []
        clock = time.perf_counter()
        with console.status(f"{name} …"):
            yield said
        seconds = time.perf_counter() - clock
        console.print(f"[bold]{self.number:>2}  {name:<12}[/] {'; '.join(said)} [dim]({seconds:.1f} s)[/]")

    def promise(self, what: str, error: float, allowed: float) -> str:
        """Note a promise of equality; returns how far it is from being broken."""
        held = error <= allowed
        if not held:
            self.broken.append(what)
        size = "bitwise equal" if error == 0 else f"largest difference {error:.1e}, allowed {allowed:.0e}"
        return f"{what}: [green]{size}[/]" if held else f"{what}: [bold red]{size}: broken[/]"

    def inspect(self) -> gatecc.Report:
        """What gatecc sees in the model."""
        with self.step("inspect") as said:
            found = gatecc.inspect(self.task.model, self.task.inputs)
            kinds = dict.fromkeys(site.kind for site in found.sites)
            count = [f"{sum(s.kind == kind for s in found.sites)} {kind}" for kind in kinds]
            said += [", ".join(count), f"{len(found.refusals)} places refused with a reason"]
        return found

    def gate(self, found: gatecc.Report) -> nn.Module:
        """The gates, which start as the identity."""
        with self.step("gate") as said:
            recipe = self.task.recipe(found)
            gated = gatecc.transform(self.task.model, recipe, self.task.inputs)
            rows = gatecc.last_report(gated)
            new = sum(sum(row.new_parameters.values()) for row in rows.rewrites)
            said += [
                f"{recipe}: {len(rows.rewrites)} gates with {new:,} parameters",
                f"contract {rows.totals.contract}",
            ]
        return gated

    def equal(self, what: str, one: nn.Module, other: nn.Module, allowed: float) -> None:
        """Compare the outputs of two models on every probe."""
        with self.step("equal") as said, torch.no_grad():
            pairs = [(outputs(one, probe), outputs(other, probe)) for probe in self.task.probes()]
            error = max(difference(a, b) for a, b in pairs)
            said.append(self.promise(f"{what} ({batches(pairs)})", error, allowed))

    def train(self, model: nn.Module) -> None:
        """Train the gates alone, for a time."""
        old = {name for name, _ in self.task.model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in old)
        with self.step("train") as said:
            said.append(self.task.start(model))
            before = self.task.measure(model)
        steps = fit(self.task, model, self.seconds)
        with self.step("measure") as said:
            after = self.task.measure(model)
            said += [f"{steps} steps of the gates alone", *(f"{k} {before[k]} → [bold]{after[k]}[/]" for k in after)]

    def checkpoint(self, model: nn.Module) -> nn.Module:
        """Save, and load into a fresh copy of the original."""
        folder = self.out / "checkpoint"
        with self.step("save") as said:
            gatecc.save(model, folder)
            size = sum(f.stat().st_size for f in folder.iterdir())
            said.append(f"{folder}/recipe.json and weights, {size / 1e6:.1f} MB")
        with self.step("load") as said:
            loaded = gatecc.load(copy.deepcopy(self.task.model), folder)
            said.append("the recipe replayed on a copy of the original, then the weights read")
        self.equal("loaded into a fresh model", model, loaded, 0.0)
        return loaded

    def export(self, model: nn.Module) -> None:
        """Write model.onnx, which gatecc compares at several sizes itself; then compare it once more, from outside."""
        folder = self.out / "onnx"
        with self.step("export") as said:
            made = gatecc.export(model, folder, self.task.inputs)
            size = sum(f.stat().st_size for f in folder.iterdir())
            error = max((c.error for c in made.compared), default=0.0)
            said.append(
                f"{folder}/model.onnx, {size / 1e6:.1f} MB, opset {made.opset}, free sizes {', '.join(made.dims)}"
            )
            said.append(f"compared at {len(made.compared)} sizes before it was written, largest difference {error:.1e}")
        with self.step("onnxruntime") as said, torch.no_grad():
            session = open_session(folder / "model.onnx")
            pairs = [(outputs(model, probe), run_onnx(session, probe)) for probe in self.task.probes()]
            error = max(difference(a, b) for a, b in pairs)
            said.append(self.promise(f"ONNX Runtime and torch ({batches(pairs)})", error, ONNX))

    def similarities(self, before: list[tuple[str, str, float]], after: list[tuple[str, str, float]]) -> None:
        """How the trained gates see a few pairs of texts."""
        if not before:
            return
        table = Table("one text", "another", "before", "after", box=box.SIMPLE_HEAD, pad_edge=False)
        for (one, other, old), (_, _, new) in zip(before, after, strict=True):
            table.add_row(one, other, f"{old:+.3f}", f"{new:+.3f}")
        console.print(table)

    def report(self, model: nn.Module) -> None:
        """The page with everything that was found, changed and measured."""
        with self.step("report") as said:
            said.append(str(gatecc.last_report(model).save(self.out / "report.html")))


def fit(task: Task, model: nn.Module, seconds: float) -> int:
    """Train what requires gradients for a time, at least one step; returns the number of steps.

    The model stays in eval mode: a minute is too short to overfit so few parameters, and dropout would only blur it.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    bar = Progress(
        TextColumn("    training"),
        BarColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
        console=console,
    )
    steps, start = 0, time.perf_counter()
    with bar:
        shown = bar.add_task("", total=seconds, said="")
        while (spent := time.perf_counter() - start) < seconds or not steps:
            optimizer.param_groups[0]["lr"] = RATE * max(1 - spent / seconds, 0.1)
            loss = task.loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            bar.update(shown, completed=time.perf_counter() - start, said=f"step {steps}, loss {loss.item():.4f}")
    return steps


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two lists of outputs, relative to max(1, their size)."""
    if [x.shape for x in one] != [y.shape for y in other]:
        return float("inf")
    return max(((x - y).abs().max() / x.abs().max().clamp(min=1)).item() for x, y in zip(one, other, strict=True))


def batches(pairs: list[Any]) -> str:
    """How many, in words."""
    return "1 batch" if len(pairs) == 1 else f"{len(pairs)} batches"


def open_session(file: Path) -> Any:
    """ONNX Runtime on the processor."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def run_onnx(session: Any, inputs: Any) -> list[Tensor]:
    """Floating-point outputs of an ONNX model, whose inputs are the tensors of the example inputs in their order."""
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), tensors, strict=True)}
    found = [torch.from_numpy(x) for x in session.run(None, feeds)]
    return [x for x in found if x.is_floating_point()]


def main(
    model: Annotated[
        str | None, typer.Option(metavar="MODULE:FACTORY", help="A model of yours: (model, example_inputs).")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to train the gates.")] = 60.0,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where everything is written.")] = Path("out"),
) -> None:
    """Gate a real pretrained encoder, or your model: inspect, gate, train, save, load, export, compare, report."""
    warnings.filterwarnings("ignore", category=UserWarning)  # torch.onnx and transformers think aloud
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    clock = time.perf_counter()
    try:
        task: Task = Sentences() if model is None else AnyModel(model)
        size = sum(p.numel() for p in task.model.parameters())
        console.print(f"[bold]{task.title}[/], {size / 1e6:.1f} M parameters; {task.about}")
        demo = Demo(task, out, seconds)
        demo.run()
    except gatecc.GateccError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(2) from error
    if task.skipped:
        console.print(f"skipped: {task.skipped}", markup=False)
    spent = time.perf_counter() - clock
    if demo.broken:
        console.print(f"[bold red]broken after {spent:.0f} s:[/] {', '.join(demo.broken)}")
        raise typer.Exit(1)
    console.print(f"[bold green]every promise held[/], {spent:.0f} s in all")


if __name__ == "__main__":
    typer.run(main)
