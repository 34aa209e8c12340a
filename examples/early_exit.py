"""Exits on a ViT: ``python examples/early_exit.py [--folds 5] [--out FOLDER]``.

Five ViTs of eight blocks are trained on the digits that scikit-learn ships, each on four fifths of the 1,797 images.
Linear heads behind two and four of the blocks are trained on the frozen model, and the probability from which on an
image leaves there is calibrated on images kept apart: the most accurate thresholds that cost at most 0.45 of the model.
The fifth that is left says what exits cost: accuracy, mean FLOPs, latency at batch 1 and of a batch. The curve of
accuracy against cost, and what an oracle reaches, is drawn into FOLDER, if there is matplotlib. ``--rule learned`` has
the learned gates of JEI-DNN, which take several times the operators to decide.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gatecc
from gatecc.capture.flops import counted
from gatecc.train import Calibration

console = Console(highlight=False)
SITES = "block[1,3]"  # behind two and four of eight blocks
Images = tuple[Tensor, Tensor]  # (B, 1, 8, 8) and labels (B,)


@dataclass(frozen=True)
class Split:
    """One fold: what the model learns from, what exits are calibrated on, and what nobody has seen."""

    train: Images
    kept: Images
    test: Images


def splits(folds: int = 5) -> list[Split]:
    """The digits in folds, the same each time; a seventh of what is not tested is kept apart."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)
    x = (x - x.mean()) / x.std()
    y = torch.tensor(found.target)
    parts = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).tensor_split(folds)
    made: list[Split] = []
    for at, test in enumerate(parts):
        rest = torch.cat([part for i, part in enumerate(parts) if i != at])
        kept, train = rest.split([len(rest) // 7, len(rest) - len(rest) // 7])
        made.append(Split(*((x[rows], y[rows]) for rows in (train, kept, test))))
    return made


def vit(images: Images, epochs: int, seed: int = 0) -> nn.Module:
    """A ViT of eight blocks on patches of 2 x 2, trained."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    shape: Any = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 8, "num_heads": 4}
    model: Any = VisionTransformer(num_classes=10, class_token=False, global_pool="avg", **shape)
    for module in model.modules():  # timm's start is for wide models
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(model.pos_embed, std=0.5)
    steps = epochs * -(-len(images[1]) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.3)
    for x, y in _batches(images, epochs, seed):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def with_exits(
    model: nn.Module, split: Split, steps: int, rule: str = "confidence", budget: float = 0.45
) -> tuple[nn.Module, Calibration]:
    """The model with exits that were trained and calibrated."""
    dynamic = gatecc.transform(model, gatecc.Exit(SITES, rule=rule), (split.train[0][:4],))
    gatecc.train.fit_exits(dynamic, list(_batches(split.train, 1, 1)), steps=steps, lr=5e-3)
    return dynamic, gatecc.train.calibrate(dynamic, [split.kept], by="cost", budget=budget)


@dataclass(frozen=True)
class Measured:
    """A model without exits and with them on what nobody has seen; costs as shares of those without."""

    accuracy: float
    dynamic: float
    flops: float
    single: float  # CPU time at batch 1
    batch: float  # CPU time of all at once
    images: int


@torch.no_grad()
def measure(model: nn.Module, dynamic: nn.Module, images: Images, repeats: int = 3) -> Measured:
    """Accuracy and costs. Latency at batch 1 is the sum over images, best of several runs in turn."""
    x, y = images
    (before, base), (after, spent) = counted(lambda: model(x)), counted(lambda: dynamic(x))
    right, kept = (float((z.argmax(-1) == y).double().mean()) for z in (before, after))
    ones = x[:120].split(1)
    single = [_best(lambda m=m: [m(one) for one in ones], repeats) for m in (model, dynamic)]
    batch = [_best(lambda m=m: m(x), repeats) for m in (model, dynamic)]
    return Measured(right, kept, spent / base, single[1] / single[0], batch[1] / batch[0], len(y))


def _best(work: Callable[[], object], repeats: int) -> float:
    taken: list[float] = []
    work()
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def _batches(images: Images, epochs: int, seed: int) -> Iterator[Images]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(images[1]), generator=generator).split(64):
            yield images[0][rows], images[1][rows]


def run(
    folds: int = 5, epochs: int = 10, steps: int = 100, rule: str = "confidence"
) -> Iterator[tuple[Measured, Calibration]]:
    """Train, calibrate and measure each fold."""
    for seed, split in enumerate(splits(folds)):
        model = vit(split.train, epochs, seed)
        dynamic, calibration = with_exits(model, split, steps, rule)
        yield measure(model, dynamic, split.test), calibration


def together(rows: list[Measured]) -> Measured:
    """The means over folds, by images."""
    images = sum(row.images for row in rows)
    names = ("accuracy", "dynamic", "flops", "single", "batch")
    means = {name: sum(getattr(row, name) * row.images for row in rows) / images for name in names}
    return Measured(**means, images=images)


def main(
    folds: Annotated[int, typer.Option(help="how many, over all images")] = 5,
    epochs: Annotated[int, typer.Option(help="of each ViT")] = 10,
    steps: Annotated[int, typer.Option(help="of training exits")] = 100,
    rule: Annotated[str, typer.Option(help="when an image leaves: confidence or learned")] = "confidence",
    out: Annotated[Path, typer.Option(help="where the picture goes")] = Path("early_exit"),
) -> None:
    """Train, calibrate, measure, draw."""
    torch.set_num_threads(1)
    rows: list[Measured] = []
    table = Table("images", "accuracy", "with exits", "FLOPs", "time, batch 1", "time, batch", title="digits ViT")
    for measured, calibration in run(folds, epochs, steps, rule):
        rows.append(measured)
        table.add_row(*_cells(measured))
        console.print(calibration)
        if importlib.util.find_spec("matplotlib") is not None:
            out.mkdir(parents=True, exist_ok=True)
            calibration.draw(out / f"curve_{len(rows)}.png")
    table.add_row(*_cells(together(rows)))
    console.print(table)


def _cells(row: Measured) -> list[str]:
    costs = (f"{cost:.2f} x" for cost in (row.flops, row.single, row.batch))
    return [str(row.images), f"{row.accuracy:.2%}", f"{row.dynamic:.2%}", *costs]


if __name__ == "__main__":
    typer.run(main)
