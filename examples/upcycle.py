"""Dense feed-forward layers become mixtures of experts: ``python examples/upcycle.py [--model FOLDER]``.

Two models are trained on at equal active FLOPs, once dense and once upcycled to experts of which one runs per token: a
ViT on the digits that scikit-learn ships, and a language model over bytes (of FOLDER as transformers saves it; without
it a small one is trained first, on the source of Python's standard library, in minutes). Both start from the same dense
weights, as the same function, and see the same batches. Then: a table of quality, active and total parameters, a
picture of how the load of each expert went, and one of which patches or bytes each expert takes.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gatecc
from examples.linearize_lm import Bytes, pretrained, small
from gatecc.ir.router import Router, RouterSpec
from gatecc.ir.site import MLP
from gatecc.passes.route.copies import Copies
from gatecc.passes.route.experts import Experts
from gatecc.passes.route.route import Route
from gatecc.train import tasks

console = Console(highlight=False)
KINDS = ("lower case", "upper case", "digit", "space", "line end", "bracket", "punctuation", "other")  # of bytes


class Subject(ABC):
    """A dense model that has learned something, and what more there is to learn."""

    title: str
    unit: str  # of `quality`
    better: int  # 1 if more is better, -1 if less is
    places: tuple[str, ...]  # what a token is, in words
    model: nn.Module
    inputs: Any  # example inputs

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Any]:
        """What both models are trained on."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch."""

    @abstractmethod
    def quality(self, model: nn.Module) -> float:
        """On data that training does not see."""

    @abstractmethod
    def probe(self) -> tuple[Any, Tensor]:
        """A batch to look at, and the place of each of its tokens: an index into ``places``."""


class Digits(Subject):
    """A ViT of 16 patches on 8 x 8 images, trained for a while."""

    title, unit, better = "ViT on digits", "accuracy", 1
    places = tuple(f"row {i // 4} column {i % 4}" for i in range(16))

    def __init__(self, epochs: int, more: int) -> None:
        from sklearn.datasets import load_digits
        from timm.models.vision_transformer import VisionTransformer

        found: Any = load_digits()
        order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
        x = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)[order] / 16
        y = torch.tensor(found.target)[order]
        self._train, self._test = (x[:1200], y[:1200]), (x[1200:], y[1200:])
        self._more = more
        torch.manual_seed(0)
        shape: dict[str, Any] = {
            "img_size": 8,
            "patch_size": 2,
            "in_chans": 1,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 4,
        }
        self.model = VisionTransformer(num_classes=10, class_token=False, global_pool="avg", **shape)
        self.inputs = (x[:2],)
        train(self.model, self._epochs(epochs, 0), self.loss, lr=2e-3, steps=epochs * 19)

    def batches(self, seed: int) -> Iterator[Any]:
        return self._epochs(self._more, 1 + seed)

    def _epochs(self, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for rows in torch.randperm(1200, generator=generator).split(64):
                yield self._train[0][rows], self._train[1][rows]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def quality(self, model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(self._test[0]).argmax(-1) == self._test[1]).float().mean())

    def probe(self) -> tuple[Any, Tensor]:
        return (self._test[0][:128],), torch.arange(16).repeat(128)


class Language(Subject):
    """A language model over bytes, trained on with windows of 512."""

    title, unit, better = "byte LM", "bits per byte", -1
    places = KINDS

    def __init__(self, model: Path | None, teach: int, budget: int, batch: int = 8, windows: int = 40) -> None:
        self._data = Bytes(windows=windows)
        self._steps, self._batch = budget // (512 * batch), batch
        self.model = small(self._data, teach) if model is None else pretrained(model)
        self.inputs = {"input_ids": torch.zeros(2, 64, dtype=torch.long), "use_cache": False}

    def batches(self, seed: int) -> Iterator[Any]:
        windows = tasks.windows_of(self._data.train, 512, self._steps * self._batch, 1 + seed)
        yield from windows.split(self._batch)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(input_ids=batch, labels=batch, use_cache=False).loss

    def quality(self, model: nn.Module) -> float:
        return self._data.bits(model)

    def probe(self) -> tuple[Any, Tensor]:
        ids = tasks.windows_of(self._data.held, 512, 4, 0)
        return {"input_ids": ids, "use_cache": False}, kind_of(ids.flatten())


def kind_of(ids: Tensor) -> Tensor:
    """The kind of each byte, an index into KINDS."""
    table = torch.full((256,), KINDS.index("other"))
    for name, members in {
        "punctuation": bytes(range(33, 127)),
        "lower case": bytes(range(97, 123)),
        "upper case": bytes(range(65, 91)),
        "digit": bytes(range(48, 58)),
        "bracket": b"()[]{}",
        "space": b" \t",
        "line end": b"\n\r",
    }.items():
        table[list(members)] = KINDS.index(name)
    return table[ids]


@dataclass
class Watch:
    """What the routers of a model choose on a probe: ``loads[layer]`` holds shares (E,) over time."""

    subject: Subject
    loads: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    taken: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # (places, E), at the last look

    def look(self, model: nn.Module) -> None:
        """Run the probe once, with a hook on each router that is taken off again."""
        inputs, places = self.subject.probe()
        routers = {name: m for name, m in model.named_modules() if isinstance(m, Router)}

        def keep(name: str, router: Router) -> Callable[..., None]:
            def hook(module: nn.Module, given: Any, chosen: Any) -> None:
                share = F.one_hot(chosen[1][:, 0], router.experts).float()
                self.loads.setdefault(name, []).append(share.mean(0))
                self.taken[name] = torch.zeros(len(self.subject.places), router.experts).index_add(0, places, share)

            return hook

        handles = [router.register_forward_hook(keep(name, router)) for name, router in routers.items()]
        was, _ = model.training, model.eval()
        try:
            with torch.no_grad():
                model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        finally:
            model.train(was)
            for handle in handles:
                handle.remove()


def train(
    model: nn.Module,
    batches: Iterator[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    lr: float,
    steps: int,
    every: int = 0,
    look: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW with a warm-up and a cosine, without decay of weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(0.05, 2 / (steps + 1))  # at least one step
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps + 1, pct_start=warm, cycle_momentum=False
    )
    model.train()
    for step, batch in enumerate(batches, 1):
        loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if every and step % every == 0:
            look(step)
    model.eval()


def upcycled(subject: Subject, experts: int, seed: int) -> nn.Module:
    """Its model with ``experts`` copies of each feed-forward layer, one of which runs per token."""
    torch.manual_seed(seed)
    router = RouterSpec("in", "linear(bias=False)", "softmax_topk(1, straight=True)", balance="aux(0.001)")
    return gatecc.transform(subject.model, Route(MLP[...], router, Copies(experts)), subject.inputs)


@dataclass(frozen=True)
class Result:
    """One training: quality at its steps, the first before it began."""

    model: nn.Module
    values: list[tuple[int, float]]
    watch: Watch


def trained(subject: Subject, model: nn.Module, seed: int, steps: int, lr: float) -> Result:
    """Train a model on a subject's batches, and look at it eight times on the way."""
    result = Result(model, [(0, subject.quality(model))], Watch(subject))
    result.watch.look(model)

    def look(step: int) -> None:
        model.eval()
        result.values.append((step, subject.quality(model)))
        result.watch.look(model)
        model.train()

    torch.manual_seed(seed)
    train(model, subject.batches(seed), subject.loss, lr=lr, steps=steps, every=max(1, steps // 8), look=look)
    return result


def parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that a token meets: one expert of each layer."""
    stacked = [m for m in model.modules() if isinstance(m, Experts)]
    total = sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() // p.size(0) * (p.size(0) - 1) for m in stacked for p in m.parameters())
    return total, total - idle


def run(subject: Subject, experts: int, seeds: int, steps: int, lr: float, out: Path) -> None:
    """Train both models with each seed; print the table, save the pictures."""
    rows = table(subject.title, "model", f"{subject.unit} before", "after", "parameters", "per token")
    gains: list[float] = []
    last: Result | None = None
    for seed in range(seeds):
        dense = trained(subject, copy.deepcopy(subject.model), seed, steps, lr)
        last = trained(subject, upcycled(subject, experts, seed), seed, steps, lr)
        for title, one in (("dense", dense), (f"upcycled, 1 of {experts}", last)):
            total, active = parameters(one.model)
            name = f"{title} (seed {seed})" if seeds > 1 else title
            rows.add_row(
                name, *(f"{v:.4f}" for v in (one.values[0][1], one.values[-1][1])), f"{total:,}", f"{active:,}"
            )
        gains.append(subject.better * (last.values[-1][1] - dense.values[-1][1]))
        curves = ", ".join(
            f"{step}: {a:.4f} / {b:.4f}" for (step, a), (_, b) in zip(dense.values, last.values, strict=True)
        )
        console.print(f"{subject.title}, seed {seed}, dense / upcycled after steps: {curves}", soft_wrap=True)
    console.print(rows)
    error = (
        f" +- {statistics.stdev(gains) / len(gains) ** 0.5:.4f} (standard error of {seeds} seeds)" if seeds > 1 else ""
    )
    console.print(f"upcycled is better by {statistics.mean(gains):.4f}{error} {subject.unit}\n", soft_wrap=True)
    if last is not None:
        draw(last.watch, subject, out / subject.title.lower().replace(" ", "-"))


def draw(watch: Watch, subject: Subject, name: Path) -> None:
    """Two pictures: the share of each expert over time, and what each expert takes at the end."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no pictures: matplotlib is not installed (pip install 'gatecc[viz]')", markup=False)
        return
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    layers = list(watch.loads)
    figure, axes = pyplot.subplots(1, len(layers), figsize=(3 * len(layers), 2.6), sharey=True, squeeze=False)
    for layer, ax in zip(layers, axes[0], strict=True):
        shares = torch.stack(watch.loads[layer])
        ax.stackplot(range(len(shares)), shares.T.numpy())
        ax.set(title=layer.removesuffix(".router"), xlabel="look", ylim=(0, 1))
    axes[0][0].set_ylabel("share of tokens")
    _save(pyplot, figure, name.with_name(f"{name.name}-load.png"))
    figure, axes = pyplot.subplots(1, len(layers), figsize=(3 * len(layers), 4), sharey=True, squeeze=False)
    for layer, ax in zip(layers, axes[0], strict=True):
        taken = watch.taken[layer]
        ax.imshow((taken / taken.sum(1, keepdim=True).clamp_min(1)).numpy(), vmin=0, vmax=1, aspect="auto")
        ax.set(title=layer.removesuffix(".router"), xlabel="expert", yticks=range(len(subject.places)))
        ax.set_yticklabels(subject.places, fontsize=7)
    _save(pyplot, figure, name.with_name(f"{name.name}-taken.png"))


def _save(pyplot: Any, figure: Any, place: Path) -> None:
    figure.savefig(place, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    console.print(f"picture: {place}")


def table(title: str, *columns: str) -> Table:
    """An empty table."""
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", no_wrap=True)
    return made


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a language model over bytes.")] = None,
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("upcycled"),
    only: Annotated[str, typer.Option(help="digits, bytes, or both with a comma.")] = "digits,bytes",
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 4,
    seeds: Annotated[int, typer.Option(help="How often both are trained.")] = 1,
    budget: Annotated[int, typer.Option(help="Bytes that the language models are trained on with.")] = 750_000,
    lr: Annotated[float, typer.Option(help="Rate of the language models, which have learned much already.")] = 6e-5,
    teach: Annotated[int, typer.Option(help="Steps of 1024 bytes to train a language model, if none is given.")] = 1500,
    epochs: Annotated[int, typer.Option(help="Epochs of the digits before and after.")] = 60,
    windows: Annotated[int, typer.Option(help="Held-out windows of 512 bytes to measure on.")] = 40,
) -> None:
    """Upcycle a ViT and a byte LM, train both beside their dense originals, compare."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    if "digits" in only:
        run(Digits(epochs, epochs), experts, seeds, 19 * epochs, 1e-3, out)
    if "bytes" in only:
        run(Language(model, teach, budget, windows=windows), experts, seeds, budget // (512 * 8), lr, out)


if __name__ == "__main__":
    typer.run(main)
