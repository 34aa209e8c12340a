"""Grains: one token for each region without detail. A ViT-S of timm, one thread."""

from __future__ import annotations

from collections.abc import Iterator

import timm
import torch
from _table import Row, best_of

import gatecc


def grains() -> Iterator[Row]:
    """The rows of this section."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = timm.create_model("vit_small_patch16_224", depth=4).eval()
    x = torch.randn(4, 3, 224, 224)
    for ratio, bar in ((0.5, 0.85), (0.25, 0.7)):
        model = gatecc.transform(plain, gatecc.recipe("d2it", ratio=ratio), (x[:2],), verify=False)
        fine = round(ratio * 49)
        with torch.no_grad():
            for batch in (1, 4):
                some, dense = best_of(lambda m=model, b=batch: m(x[:b]), lambda b=batch: plain(x[:b]), repeats=5)
                tokens = f"{4 * fine + 49 - fine} of 196 tokens"
                yield Row(
                    f"d2it: {ratio:.0%} of the regions fine, {tokens}, batch {batch}: time / dense", some / dense, bar
                )
