"""Loops over steps: what a step does not need is not computed."""

from __future__ import annotations

from collections.abc import Iterator

import timm
import torch
from _table import Row, best_of
from torch import nn

import gatecc
from gatecc.ops import paths


def loops() -> Iterator[Row]:
    """Samples that are sure, modules that are not called, steps with the switch off, samples that did not change."""
    yield from _confidence()
    yield from _workspace()
    yield from _transient()
    yield from _step_cache()


def _confidence() -> Iterator[Row]:
    """A threshold that half of the samples are above at the fourth of 8 steps, against all 8."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    plain = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    x = torch.randn(16, 3, 32, 32)
    model = gatecc.transform(
        plain, gatecc.recipe("dynamic-confidence", steps=8, threshold=2.0, spike_threshold=0.05), (x,)
    )
    traces = gatecc.train.confidence_traces(model, [(x,)])
    confidence = traces.softmax(-1).amax(-1)
    theta = float(confidence[:, 3].median())
    stop = gatecc.train.stops(traces, traces[:, -1].argmax(-1), [theta])[0]
    threshold = next(b for n, b in model.named_buffers() if n.endswith("confidence.threshold"))

    def run(at: float) -> None:
        threshold.fill_(at)
        with torch.no_grad():
            model(x)

    run(theta)
    early, dense = best_of(lambda: run(theta), lambda: run(2.0), repeats=5)
    yield Row(
        f"dynamic confidence: {stop.steps:.2f} of 8 steps, time against all steps", early / dense, stop.steps / 8 + 0.1
    )


def _workspace() -> Iterator[Row]:
    """Three steps over three blocks, one block in each, against all blocks in each and a mask."""
    plain = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=3, num_classes=10).eval()
    x = torch.randn(8, 3, 64, 64)
    model = gatecc.transform(plain, "global-workspace", (x,), verify=False)

    def masked() -> None:
        with paths.whole(), torch.no_grad():
            model(x)

    def skipping() -> None:
        with torch.no_grad():
            model(x)

    skipping()
    early, dense = best_of(skipping, masked, repeats=5)
    yield Row("global workspace: 1 of 3 modules per step, time against all of them", early / dense, 0.5)


def _transient() -> Iterator[Row]:
    """A child that is on for a fifth of the steps, against all steps computed and masked."""
    x, active = torch.randn(16, 256, 128), torch.rand(16, 256) < 0.2
    weights = (torch.randn(768, 128) / 16, torch.randn(768, 256) / 16, torch.zeros(768), torch.zeros(768))
    operator = torch.ops.gatecc.transient

    def run(on: torch.Tensor) -> None:
        with torch.no_grad():
            operator(x, on, *weights)

    everywhere = torch.ones_like(active)
    early, dense = best_of(lambda: run(active), lambda: run(everywhere), repeats=5)
    yield Row("persistent-transient: the child on in 20 % of the steps, time against all steps", early / dense, 0.5)


def _step_cache() -> Iterator[Row]:
    """A sampler's steps in which a quarter of the samples change, against the model alone."""
    plain = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=4, num_classes=10).eval()
    inputs = [torch.randn(8, 3, 64, 64)]
    for step in range(6):
        inputs.append(inputs[-1].clone())
        inputs[-1][[step % 8, (step + 1) % 8]] += 1

    def steps() -> None:
        with torch.no_grad():
            for x in inputs:
                plain(x)

    def kept() -> None:
        with gatecc.step_cache(plain):
            steps()

    kept()
    early, dense = best_of(kept, steps, repeats=3)
    yield Row("step cache: 2 of 8 samples change per step, time against all (one check included)", early / dense, 0.7)
