"""Softmax attention becomes linear attention, and is healed: ``python examples/linearize_lm.py --model FOLDER``.

FOLDER holds a language model over bytes as transformers saves it. Without it a small one is trained first, on the
source of Python's standard library (minutes). Three conversions follow: Liger (half linear, half a window of softmax,
no new parameters), gated linear attention in three layers of four, and in all. Each is healed by distillation on at
most 0.75 M bytes. Then: bits per byte on held-out source, a plot of them against the bytes used, the same prompt
continued by each model, and memory and time a token against the length.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import gatecc
from gatecc.train import Healed, Tune, heal, tasks

LENGTH = 512
BUDGET = 750_000
LENGTHS = (64, 256, 1024, 4000)
PROMPT = "def read_file(path, encoding=None):\n    "

console = Console(highlight=False)


@dataclass(frozen=True)
class Conversion:
    """One way to linearize: a recipe with options, the rates, the weights of losses and the batch that heal it.

    Batches are small, for the number of updates decides, not the number of tokens in each.
    """

    title: str
    recipe: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    lr: float = 2e-3
    lr_new: float = 4e-3
    task: float = 0.0
    hidden: float = 0.0
    batch: int = 2

    def student(self, teacher: nn.Module) -> nn.Module:
        """A copy of the teacher with other token mixers."""
        ids = torch.zeros(2, 64, dtype=torch.long)
        recipe = gatecc.recipe(self.recipe, **self.options)
        return gatecc.transform(teacher, recipe, {"input_ids": ids, "use_cache": False})

    def heal(self, teacher: nn.Module, data: Bytes, budget: int, evaluations: int = 8, **options: Any) -> Healed:
        """Distil the teacher's logits into a new student, with at most ``budget`` bytes."""
        steps = max(1, budget // (LENGTH * self.batch))
        student = self.student(teacher)
        stage = Tune(
            steps,
            optimizer="muon",
            lr=self.lr,
            lr_new=self.lr_new,
            task=self.task,
            distill=1,
            hidden=self.hidden,
            layers=blocks(student),
        )
        every = max(1, steps // evaluations)
        batches = Batches(data, self.batch)
        return heal(student, teacher, batches, tune=stage, evaluate=data.bits, every=every, **options)


def blocks(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's layers: the members of its longest list."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    name, longest = max(lists, key=lambda pair: len(pair[1]))
    return tuple(f"{name}.{i}" for i in range(len(longest)))


# Features of rotated queries and keys, divided by their sum: an average of values at first, as softmax attention is.
GLA = {
    "feature": "hedgehog(temperature=1.0)",
    "rope": True,
    "normalize": True,
    "norm": False,
    "gate": False,
    "conv": 4,
    "longest": 256.0,
}
CONVERSIONS = {
    "liger": Conversion("Liger: linear and a window of softmax", "liger", lr=3e-4, task=0.5),
    "hybrid": Conversion(
        "GLA, 1 layer in 4 softmax", "gla", {**GLA, "keep": "3::4"}, 5e-4, 3e-3, task=0.5, hidden=1, batch=1
    ),
    "gla": Conversion("GLA in all layers", "gla", GLA),
}


class Bytes:
    """The standard library's source: random windows of the training part, bits per byte of the other."""

    def __init__(self, seed: int = 0, windows: int = 30) -> None:
        self.train, self.held = tasks.stdlib_bytes()
        self.seed, self.windows = seed, windows

    def bits(self, model: nn.Module) -> float:
        """Bits per byte on the held-out part."""
        call: Any = model
        return tasks.bits_per_token(lambda x: call(x, use_cache=False).logits, self.held, LENGTH, self.windows)


@dataclass(frozen=True)
class Batches:
    """Random windows, a few at a time: as many as the budget pays for, the same in each reading."""

    data: Bytes
    size: int = 2

    def __iter__(self) -> Iterator[Tensor]:
        count = BUDGET // LENGTH + self.size
        windows = tasks.windows_of(self.data.train, LENGTH, count - count % self.size, self.data.seed)
        yield from windows.split(self.size)


def pretrained(folder: Path) -> nn.Module:
    """The model in a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def small(data: Bytes, steps: int) -> nn.Module:
    """A byte LM of 0.9 M parameters, trained here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    heal(model, None, Batches(data), tune=Tune(steps, optimizer="muon", lr=5e-3, lr_new=5e-3), progress=True)
    return model.eval()


def continued(model: nn.Module, prompt: str, length: int) -> str:
    """The likeliest continuation, by the decoder that is derived from the model."""
    ids = torch.tensor([list(prompt.encode())])
    decoder = gatecc.decoder(model, {"input_ids": ids, "use_cache": False})
    out = decoder.generate(ids, length)
    return bytes(out[0].tolist()).decode(errors="replace")


def footprint(
    model: nn.Module, lengths: Sequence[int] = LENGTHS, repeats: int = 10
) -> Iterator[tuple[int, int, float]]:
    """For each length of the past: bytes of state and CPU seconds for one more token."""
    decoder = gatecc.decoder(model, {"input_ids": torch.zeros(1, 64, dtype=torch.long), "use_cache": False})
    for length in lengths:
        logits, state = decoder.prefill(torch.randint(0, 256, (1, length)))
        token = logits[:, -1].argmax(-1)
        size = sum(t.numel() * t.element_size() for t in tree_leaves(state) if isinstance(t, Tensor))
        states = [state]

        def step(token: Tensor = token, states: list[Any] = states) -> None:
            """Behind the last one: a state that is stepped twice is copied."""
            states.append(decoder.step(token, states.pop())[1])

        yield length, size, best(step, repeats)


def best(work: Callable[[], object], repeats: int) -> float:
    """The least CPU time of several runs."""
    times: list[float] = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


Curves = dict[str, list[tuple[int, float]]]


def plot(curves: Curves, level: float, out: Path) -> Path:
    """Bits per byte against bytes used: a PNG by matplotlib where it is installed, else an SVG."""
    if importlib.util.find_spec("matplotlib") is None:
        place = out / "healing.svg"
        place.write_text(svg(curves, level), encoding="utf-8")
        return place
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for title, points in curves.items():
        axes.plot([t / 1e3 for t, _ in points], [v for _, v in points], marker="o", label=title)
    axes.axhline(level, color="black", linestyle="--", label="softmax teacher")
    axes.set(xlabel="thousand bytes used", ylabel="held-out bits per byte", yscale="log")
    axes.legend()
    figure.savefig(out / "healing.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return out / "healing.png"


def svg(curves: Curves, level: float) -> str:
    """The plot by hand: 640 by 360, the vertical axis logarithmic."""
    colours = ("#2563eb", "#d97706", "#059669", "#9333ea")
    points = [p for curve in curves.values() for p in curve]
    right, top = max(t for t, _ in points) or 1, max(v for _, v in points)
    low, high = torch.tensor([level * 0.98, top * 1.02]).log().tolist()

    def x(tokens: float) -> float:
        return 60 + 560 * tokens / right

    def y(value: float) -> float:
        return 320 - 290 * (float(torch.tensor(value).log()) - low) / (high - low)

    rows = ['<svg xmlns="http://www.w3.org/2000/svg" width="640" height="360" font-family="sans-serif" font-size="12">']
    rows.append('<rect width="640" height="360" fill="white"/>')
    for value in (level, (level * top) ** 0.5, top):
        rows.append(f'<text x="8" y="{y(value) + 4:.1f}">{value:.3f}</text>')
    rows.append(f'<path d="M60 {y(level):.1f}H620" stroke="black" stroke-dasharray="6 4"/>')
    rows.append(f'<text x="60" y="345">0</text><text x="520" y="345">{right / 1e3:,.0f} thousand bytes</text>')
    for i, (title, curve) in enumerate(curves.items()):
        path = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in curve)
        rows.append(f'<polyline points="{path}" fill="none" stroke="{colours[i % 4]}" stroke-width="2"/>')
        rows.append(f'<text x="330" y="{30 + 18 * i}" fill="{colours[i % 4]}">{title}</text>')
    return "\n".join([*rows, "</svg>\n"])


def table(title: str, *columns: str) -> Table:
    """An empty table."""
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    return made


def show_footprints(models: dict[str, nn.Module], lengths: Sequence[int]) -> None:
    """Memory and time of one more token."""
    rows = table("one more token", "model", *(f"after {n:,}" for n in lengths))
    for title, model in models.items():
        cells = [f"{size / 1024:,.0f} KiB  {1e3 * s:.2f} ms" for _, size, s in footprint(model, lengths)]
        rows.add_row(title, *cells)
    console.print(rows)


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a language model over bytes.")] = None,
    out: Annotated[Path, typer.Option(help="Where the plot and the checkpoints go.")] = Path("linearized"),
    budget: Annotated[int, typer.Option(help="Bytes that healing may use.")] = BUDGET,
    teach: Annotated[int, typer.Option(help="Steps of 1024 bytes to train a model, if none is given.")] = 1500,
    only: Annotated[str, typer.Option(help="Names of conversions, with commas.")] = ",".join(CONVERSIONS),
    windows: Annotated[int, typer.Option(help="Held-out windows of 512 bytes to measure on.")] = 30,
    length: Annotated[int, typer.Option(help="Bytes to generate.")] = 120,
) -> None:
    """Linearize a byte LM in several ways, heal, measure, generate."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    data = Bytes(windows=windows)
    teacher = small(data, teach) if model is None else pretrained(model)
    level = data.bits(teacher)
    rows = table("held-out bits per byte", "model", "before", "healed", "ratio", "bytes used", "minutes")
    rows.add_row("softmax teacher", "", f"{level:.4f}", "1", "", "")
    models, curves = {"softmax teacher": copy.deepcopy(teacher)}, Curves()
    for name in only.split(","):
        conversion = CONVERSIONS[name]
        done = conversion.heal(teacher, data, budget, checkpoint=out / name, progress=True)
        models[conversion.title], curves[conversion.title] = done.student, done.values
        first, last = done.values[0][1], done.values[-1][1]
        rows.add_row(
            conversion.title,
            f"{first:.3f}",
            f"{last:.4f}",
            f"{last / level:.4f}",
            f"{done.tokens:,}",
            f"{done.seconds / 60:.1f}",
        )
    console.print(rows)
    console.print(f"plot: {plot(curves, level, out)}\n")
    for title, one in models.items():
        console.print(f"[bold]{title}[/bold]")
        console.print(PROMPT + continued(one, PROMPT, length), markup=False)
    show_footprints(models, LENGTHS)


if __name__ == "__main__":
    typer.run(main)
