"""Width: channels that are off are not computed. A ResNet that was trained on digits (sklearn), r = 0.7."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from _table import Row, best_of
from sklearn.datasets import load_digits
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import gatecc
from gatecc.ir.gate import GateModule
from gatecc.train import calibrate_channels, channel_costs

_SIZE, _BATCH = 32, 64


def width() -> Iterator[Row]:
    """The rows of this section."""
    x, y, held_x, held_y = _digits()
    dense = _resnet()
    _train(dense, x, y, epochs=3, rate=2e-3)
    gated: Any = gatecc.transform(dense, gatecc.recipe("ftwt", r=0.7), (x[:2],))
    gates = {name for name, _ in gated.named_parameters()} - {name for name, _ in dense.named_parameters()}
    _train(gated, x, y, epochs=1, rate=0.05, only=gates)
    _train(gated, x, y, epochs=2, rate=1e-3)
    calibrate_channels(gated, x[:256])
    accuracies = [_accuracy(model, held_x, held_y) for model in (dense, gated)]
    yield Row("ftwt: accuracy lost on digits", accuracies[0] - accuracies[1], unit=f"of {accuracies[0]:.3f}")
    costs = channel_costs(gated, held_x)
    yield Row("ftwt: FLOPs against those of the labels (r = 0.7)", abs(costs.gates / costs.labels - 1), 0.05)
    yield Row("ftwt: FLOPs against dense", costs.gates / costs.dense)
    with torch.no_grad():
        for batch, repeats, bar in ((1, 40, 0.9), (8, 12, None), (64, 3, None)):
            given = [held_x[i : i + batch] for i in range(0, 4 * batch, batch)]
            times = best_of(
                *(lambda m=m, x=x: m(x) for x in given for m in (dense, gated)),
                repeats=repeats,
            )
            ratio = sum(times[1::2]) / sum(times[::2])
            yield Row(f"ftwt: latency against dense, batch {batch}", ratio, bar)


def _resnet() -> nn.Module:
    """Two basic blocks at 16 x 16 and 8 x 8, behind a stem without pooling, as small images have it."""
    torch.manual_seed(0)
    block: Any = BasicBlock
    model = ResNet(block, (1, 1, 1, 1), num_classes=10, in_chans=1, stem_width=32, channels=(64, 96, 96, 96))
    model.maxpool = model.layer3 = model.layer4 = nn.Identity()
    return model


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (B, 1, 32, 32) and their digits, one in five held out."""
    images, digits = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    x = F.interpolate(x, size=(_SIZE, _SIZE), mode="bilinear")
    held = torch.arange(len(x)) % 5 == 0
    y = torch.tensor(digits)
    return x[~held], y[~held], x[held], y[held]


def _train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float, only: Collection[str] = ()) -> None:
    """Train a model on its task, or ``only`` some parameters, the gates, on their labels."""
    torch.manual_seed(0)
    for module in model.modules():
        module.training = not only or isinstance(module, GateModule)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not only or name in only)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    steps = epochs * (len(x) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for i in range(0, len(x) - _BATCH + 1, _BATCH):
            chosen = order[i : i + _BATCH]
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(-1) == y).float().mean())
