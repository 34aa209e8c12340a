"""Masks of tasks: channels that a task has off are neither read nor computed. A CaiT of timm and a ViT, one thread."""

from __future__ import annotations

from collections.abc import Iterator

import timm
import torch
from _table import Row, best_of
from torch import Tensor, nn

import gatecc
from gatecc.passes.task_mask import TaskMasks


class _Tasks(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return self.net(x)


def tasks() -> Iterator[Row]:
    """The rows of this section."""
    torch.set_num_threads(1)
    yield from _rows("CaiT-S of 2 blocks, class-attention", "cait_s24_224", "*token_only*", 0.25, None)
    yield from _rows("ViT-S of 2 blocks, every block", "vit_small_patch16_224", "...", 0.25, 0.8)
    yield from _rows("ViT-S of 2 blocks, every block", "vit_small_patch16_224", "...", 0.5, 0.95)


def _rows(title: str, name: str, at: str, kept: float, bar: float | None) -> Iterator[Row]:
    torch.manual_seed(0)
    plain = _Tasks(timm.create_model(name, depth=2)).eval()
    x, task = torch.randn(8, 3, 224, 224), torch.arange(8) % 2
    recipe = gatecc.recipe("gcab", tasks=2, attention=f"attention[{at}]", mlp=f"mlp[{at}]")
    gated = gatecc.transform(plain, recipe, (x, task))
    with torch.no_grad():
        for module in gated.modules():
            if isinstance(module, TaskMasks):
                for table in module.parameters():
                    table.copy_(torch.rand_like(table) - 1 + kept)
    yield Row(f"gcab: {title}, {kept:.0%} on: masked and skipped", _distance(gated, x, task), 1e-5)
    with torch.no_grad():
        for label, given in (
            ("one image", (x[:1], task[:1])),
            ("8 images of one task", (x, task * 0)),
            ("8 of two", (x, task)),
        ):
            dense, some = best_of(lambda g=given: plain(*g), lambda g=given: gated(*g), repeats=5)
            yield Row(f"gcab: {title}, {kept:.0%} of the channels on, {label}: time / dense", some / dense, bar)


def _distance(model: nn.Module, x: Tensor, task: Tensor) -> float:
    masked = model(x[:2], task[:2]).detach()
    with torch.no_grad():
        return float((masked - model(x[:2], task[:2])).abs().max() / masked.abs().max())
