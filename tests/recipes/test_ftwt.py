"""FTWT: masks and labels by hand, what is skipped, and what is refused."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import gatecc
from gatecc.capture.flops import counted
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.recipes.samples import weighted
from gatecc.train import calibrate_channels, channel_costs
from tests.recipes.checks import agree, new_parameters, randomise, reverted

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))


class _Logits(nn.Module):
    """A model of transformers as a function of its images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


@cache
def _family(name: str) -> nn.Module:
    """Models that gatecc's authors did not write, with random statistics in their norms."""
    torch.manual_seed(0)
    if name == "timm":
        library: Any = timm.models.resnet
        model = library.ResNet(library.BasicBlock, (1, 1, 1, 1), num_classes=4, channels=(8, 12, 16, 16), stem_width=8)
    elif name == "mobile":  # depthwise convolutions, hardswish, squeeze and excite
        model = timm.create_model("mobilenetv3_small_050", num_classes=4)
    else:
        sizes: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 4}
        config = transformers.ResNetConfig(embedding_size=8, layer_type=name, **sizes)
        model = _Logits(transformers.ResNetForImageClassification(config))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.weight, 1.0, 0.2)
    return model.eval()


def _gated(plain: nn.Module, **options: Any) -> Any:
    return gatecc.transform(plain, gatecc.recipe("ftwt", **options), (X,), verify=False)


class Pair(nn.Module):
    """A convolution, a norm, an activation, and a convolution that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


def _mask(gate: nn.Module, x: Tensor) -> Tensor:
    z = x.amax((2, 3)) @ gate.get_parameter("weight").T + gate.get_parameter("bias")
    return (torch.sigmoid(z) > 0.5).to(x.dtype)[:, :, None, None]


def test_masks_are_those_of_the_pooled_input_and_sit_behind_norm_and_activation() -> None:
    plain: Any = weighted(Pair())
    model = _gated(plain, sites="conv[...]")
    assert agree(model, plain, X) == 0, "every channel is on"
    randomise(new_parameters(model, plain).values())
    with torch.no_grad():
        model.b.gate.weight.sub_(model.b.gate.weight.mean(1, keepdim=True))
    a = torch.relu(plain.norm(plain.a(X))) * (on := _mask(model.a.gate, X))
    b = plain.b(a) * (last := _mask(model.b.gate, a))
    assert 0.05 < float(on.mean()) < 0.95
    assert 0.05 < float(last.mean()) < 0.95
    with torch.no_grad():
        assert torch.allclose(model(X), b, atol=1e-5)
    reverted(model, plain, (X,))


@pytest.mark.parametrize("joint", [False, True])
def test_labels_are_the_fewest_channels_that_hold_the_mass(joint: bool) -> None:
    plain: Any = weighted(Pair())
    model = _gated(plain, sites="conv[...]", r=0.6, joint=joint).train()
    target: Any = copy.deepcopy(plain).train()
    randomise(new_parameters(model, plain).values(), 0.3)
    h = torch.relu(target.norm(target.a(X)))
    gates = [model.a.gate, model.b.gate]
    w = [{n: p.detach().clone().requires_grad_() for n, p in g.named_parameters()} for g in gates]
    x, loss = X, torch.zeros(())
    for number, y in enumerate((h, None)):
        y = target.b(x) if y is None else y
        read = (x if joint else x.detach()).amax((2, 3))
        z = read @ w[number]["weight"].T + w[number]["bias"]
        loss = loss + F.binary_cross_entropy_with_logits(z, _labels(y.detach().abs().sum((2, 3)), 0.6))
        hard = (torch.sigmoid(z) > 0.5).float()
        soft = torch.sigmoid(z)
        m = hard + soft - soft.detach() if joint else hard
        x = y * m[:, :, None, None]
    (x.square().mean() + loss).backward()
    model(X).square().mean().backward()
    for gate, mine in zip(gates, w, strict=True):
        for name, p in gate.named_parameters():
            assert p.grad is not None
            assert torch.allclose(p.grad, mine[name].grad, atol=1e-6), name
    for name, p in target.named_parameters():
        assert torch.allclose(model.get_parameter(name).grad, p.grad, atol=1e-5), name
    assert torch.equal(model.norm.running_mean, target.norm.running_mean), "the norm saw every channel"


def _labels(mass: Tensor, r: float) -> Tensor:
    """By trying k = 1, 2, ... for each sample."""
    found = torch.zeros_like(mass)
    for row, out in zip(mass, found, strict=True):
        order = row.argsort(descending=True)
        k = next(k for k in range(1, len(row) + 1) if row[order[:k]].sum() >= r * row.sum())
        out[order[:k]] = 1
    return found


@pytest.mark.broad(2)
@pytest.mark.parametrize(
    ("name", "conv"), [("timm", "conv[1:]"), ("basic", "conv[1:]"), ("bottleneck", "conv[...]"), ("mobile", "conv[1:]")]
)
def test_what_is_off_is_left_out_and_the_result_is_the_masked_one(name: str, conv: str) -> None:
    plain = _family(name)
    model = _gated(plain, sites=conv)
    assert agree(model, plain, X) == 0
    assert agree(model, plain, X[:1]) == 0
    every = counted(lambda: model(X[:1]))[1]
    randomise(new_parameters(model, plain).values(), 0.5)
    for x in (X[:1], X):
        masked = model(x).detach()  # where a gradient is wanted every channel is computed
        with torch.no_grad():
            skipping = model(x)
        assert float((masked - skipping).abs().max()) <= 1e-5 * max(1.0, float(masked.abs().max()))
    assert counted(lambda: model(X[:1]))[1] < 0.95 * every
    reverted(model, plain, (X,))


def test_flops_are_those_of_the_channels_that_are_on() -> None:
    plain = _family("basic")
    model, every = _gated(plain, r=0.5), _gated(plain, r=1.0)
    start, whole = channel_costs(model, X), channel_costs(every, X)
    assert whole.labels == whole.gates == whole.dense
    assert whole.dense == pytest.approx(counted(lambda: every(X))[1] / 3), "the gates included"
    assert start.labels < 0.8 * start.gates
    assert start.gates == start.dense == whole.dense
    randomise(new_parameters(model, plain).values(), 0.5)
    each = [counted(lambda x=x: model(x))[1] for x in X.split(1)]
    assert channel_costs(model, X).gates == pytest.approx(sum(each) / 3)
    with pytest.raises(ArgumentError, match="have no labels"):
        channel_costs(plain, X)


def test_gates_learn_their_labels_and_r_1_stays_the_original() -> None:
    plain = _family("timm")
    for r in (0.6, 1.0):
        model = _gated(plain, r=r)
        new = new_parameters(model, plain)
        optimizer = torch.optim.Adam(new.values(), 0.3)
        for module in model.modules():
            module.training = type(module).__name__ == "GateModule"
        for _ in range(12):
            optimizer.zero_grad()
            (model(X) * 0).sum().backward()
            optimizer.step()
        model.eval()
        if r == 1:
            assert agree(model, plain, X) == 0
            continue
        calibrate_channels(model, X)
        costs = channel_costs(model, X)
        assert costs.gates == pytest.approx(costs.labels, rel=0.05)
        assert costs.gates < 0.9 * costs.dense
    with pytest.raises(ArgumentError, match="nothing to calibrate"):
        calibrate_channels(plain, X)


def test_a_checkpoint_half_precision_and_other_sizes(tmp_path: Path) -> None:
    plain = _family("basic")
    model = _gated(plain)
    randomise(new_parameters(model, plain).values(), 0.5)
    gatecc.save(model, tmp_path / "made")
    again = gatecc.load(plain, tmp_path / "made")
    wide = torch.randn(2, 3, 24, 20)
    assert agree(again, model, wide) == 0
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        assert half(X.bfloat16()).dtype == torch.bfloat16
    compiled: Any = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(X), model(X), atol=1e-5)


def test_grouped_convolutions_are_refused_by_name_and_others_are_gated() -> None:
    plain = timm.create_model("regnetx_002", num_classes=4).eval()
    with pytest.raises(SiteRefusedError, match="cannot be left out") as raised:
        gatecc.transform(plain, gatecc.recipe("ftwt", sites="conv[s1.b1.conv2.conv]"), (X,))
    assert "groups" in str(raised.value.found)
    model = gatecc.transform(plain, gatecc.recipe("ftwt", sites="conv[*conv[13].conv]"), (X,))
    assert agree(model, plain, X) == 0
