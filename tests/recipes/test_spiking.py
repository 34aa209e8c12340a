"""Spiking convolutions, conversion, and dynamic confidence, on classifiers of timm and torchvision."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError
from gatecc.ops.paths import watched
from gatecc.recipes import samples
from tests.recipes.checks import randomise

X = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@cache
def family(name: str) -> Any:
    torch.manual_seed(0)
    if name == "timm":
        timm = pytest.importorskip("timm")
        model = timm.create_model("resnet10t", num_classes=5, stem_width=8, channels=(8, 8, 8, 8))
    else:
        transformers = pytest.importorskip("transformers")
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=5))
    model.eval()
    randomise((p for p in model.parameters() if p.dim() == 1), 0.3)
    return model


class Fired(nn.Module):
    """An IF neuron that keeps its membrane, in the place of a ReLU."""

    u: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        u = (torch.full_like(x, 0.5) if self.u is None else self.u) + x
        fired = (u >= 1).to(x.dtype)
        self.u = u - fired
        return fired


@torch.no_grad()
def by_hand(model: Any, x: Tensor, steps: int) -> Tensor:
    """The logits of each step, (B, T, C): a copy of the model with neurons, called step by step."""

    def neurons(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, Fired())
            neurons(child)

    other = copy.deepcopy(model)
    neurons(other)
    return torch.stack([logits_of(other(x)) for _ in range(steps)], 1)


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.broad(2)
@pytest.mark.parametrize("name", ["timm", "transformers"])
@torch.no_grad()
def test_neurons_in_models_that_others_wrote(name: str) -> None:
    site = {} if name == "timm" else {"sites": "model[...].logits"}
    model = gatecc.transform(family(name), gatecc.recipe("tsm-conv", steps=3, **site), (X,), verify=False)
    logits = by_hand(family(name), X, 3)
    assert torch.allclose(logits_of(model(X)), logits.mean(1), atol=1e-4)  # p = 1: one convolution that all steps share
    traces, T = logits.cumsum(1), 3
    confidence = traces.softmax(-1).amax(-1)
    theta = float(confidence[:, :-1].median())
    recipe = gatecc.recipe("dynamic-confidence", steps=T, threshold=theta, **site)
    live = gatecc.transform(family(name), recipe, (X,), verify=False)
    sure = confidence > theta
    sure[:, -1] = True
    first = sure.int().argmax(1)
    rows = torch.arange(6)
    expected = traces[rows, first] / (first + 1).unsqueeze(-1)
    assert 0 < first.sum() < 2 * 6
    ran: list[int] = []
    with watched(lambda taken, _: ran.append(taken.counts[0])):
        assert torch.allclose(logits_of(live(X)), expected, atol=1e-4)
    assert ran == [int((first >= t).sum()) for t in range(1, T)][: len(ran)]


def test_a_threshold_is_picked_on_traces_and_the_live_run_does_as_they_say() -> None:
    plain, (x,) = samples.spiking()
    x = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(5))
    model = gatecc.transform(plain, gatecc.recipe("dynamic-confidence", steps=6, spike_threshold=0.5), (x,))
    traces = gatecc.train.confidence_traces(model, [(x[:40],), (x[40:],)])
    labels = traces[:, -1].argmax(-1)  # what all steps say
    assert traces.shape == (64, 6, 5)
    front = gatecc.train.pareto(gatecc.train.stops(traces, labels))
    assert len(front) > 2
    assert all(a.steps > b.steps and a.accuracy > b.accuracy for a, b in pairwise(front))
    picked = gatecc.train.pick_threshold(traces, labels, 0.05)
    whole = (traces[:, -1].argmax(-1) == labels).double().mean()
    assert picked.accuracy >= whole - 0.05
    assert picked.steps < 6
    for stop in (*front, picked):
        next(b for n, b in model.named_buffers() if n.endswith("confidence.threshold")).fill_(stop.threshold)
        ran: list[int] = []
        with watched(lambda taken, _, ran=ran: ran.append(taken.counts[0])), torch.no_grad():
            got = model(x).argmax(-1)
        assert float((got == labels).double().mean()) == pytest.approx(stop.accuracy, abs=1e-9)
        assert 1 + sum(ran) / 64 == pytest.approx(stop.steps)
    with pytest.raises(ArgumentError, match="no loop that may stop"):
        gatecc.train.confidence_traces(plain, [(x,)])
    with pytest.raises(ArgumentError, match="nothing to calibrate on"):
        gatecc.train.confidence_traces(model, [])


def test_a_converted_network_approaches_the_quantised_one() -> None:
    made, (x,) = samples.spiking()
    plain: Any = made
    errors: list[float] = []
    for steps in (4, 16, 64):
        recipe = gatecc.recipe("tsm-conv", steps=steps, convolutions="", neurons="activation[0]")
        model = gatecc.transform(plain, recipe, (x,), verify=False)
        (peak,) = gatecc.train.balance(model, lambda m: m(x), plain).values()
        y = plain[1](plain[0](x))
        rounded = ((y * steps / peak + 0.5).floor().clamp(0, steps)) * peak / steps  # clip-floor-shift of the rate
        errors.append(float((model(x) - plain(x)).detach().abs().max()))
        probe = gatecc.transform(nn.Sequential(plain[0], plain[1], plain[2]), recipe, (x,), verify=False)
        gatecc.train.balance(probe, lambda m: m(x), nn.Sequential(plain[0], plain[1], plain[2]))
        assert torch.allclose(probe(x), plain[2](rounded), atol=1e-4)
    assert errors[2] < errors[1] < errors[0]


def test_threshold_guidance_is_another_number_in_inference() -> None:
    plain, (x,) = samples.spiking()
    model = gatecc.transform(plain, gatecc.recipe("tsm-conv", steps=4), (x,))
    other = gatecc.transform(plain, gatecc.recipe("tsm-conv", steps=4, threshold=0.8), (x,))
    for name, buffer in model.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(0.8)
    assert torch.equal(model(x), other(x))
