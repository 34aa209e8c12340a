"""Section of dynamic.py: a second pass for the samples that need it, against one for all of them (Q-Zoom)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
import torch.nn.functional as F
from _table import Row, best_of

import gatecc
from gatecc.train import TwoScales
from gatecc.train.zoom import twig_of


def zoom() -> Iterator[Row]:
    """Time of a ViT (6 x 192, 64 patches) of which a quarter of a batch looks again, and of none at batch 1."""
    shape: Any = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **shape).eval()
    fine = torch.randn(16, 3, 128, 128)
    image = F.avg_pool2d(fine, 2)
    zooming: Any = gatecc.transform(TwoScales(model), "q-zoom", (image, fine))
    twig = twig_of(zooming)
    with torch.no_grad():
        scores = list[torch.Tensor]()
        hook = twig.register_forward_hook(lambda m, given, out: scores.append(twig.looked(given[0])[0].sigmoid()))
        zooming(image, fine)
        hook.remove()
        quarter = float(scores[0].sort(descending=True).values[3:5].mean())

        def at(threshold: float, rows: int) -> Any:
            def run() -> None:
                twig.threshold.fill_(threshold)
                zooming(image[:rows], fine[:rows])

            return run

        def plain() -> None:
            model(image[:1])

        some, every = best_of(at(quarter, 16), at(-1.0, 16), repeats=10)
        yield Row("q-zoom: a quarter of 16 samples look again, of all of them", some / every, 0.75, unit="x")
        none, one, alone = best_of(at(2.0, 1), at(-1.0, 1), plain, repeats=20)
        yield Row("q-zoom: batch 1 that does not, of one that does", none / one, 0.7, unit="x")
        yield Row("q-zoom: batch 1 that does not, of the model without", none / alone, unit="x")
