"""Gates by maps on networks of timm and transformers, against hooks on the plain convolutions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError, TrainingError
from gatecc.train import class_maps, mask_pyramid


def timm_resnet() -> Any:
    timm: Any = pytest.importorskip("timm")
    shape: Any = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "num_classes": 4}
    return timm.create_model("resnet18", **shape), "conv[layer1.*,layer2.*]"


def regnet() -> Any:
    """Grouped convolutions, and squeeze and excitation on maps of one pixel."""
    from transformers import RegNetConfig, RegNetForImageClassification

    shape: Any = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "groups_width": 4}
    return RegNetForImageClassification(RegNetConfig(**shape)), "conv[*.layer.0.*]"


def logits(model: Any, x: Tensor) -> Tensor:
    found = model(x)
    return found if isinstance(found, Tensor) else found.logits


@pytest.fixture(scope="module", params=[timm_resnet, regnet])
def gated(request: Any) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    plain, sites = request.param()
    plain, x = plain.eval(), torch.randn(3, 3, 32, 32)
    model = gatecc.transform(copy.deepcopy(plain), gatecc.recipe("multi-scale-gates", sites=sites, classes=3), (x,))
    return plain, model, x


def test_it_is_the_equation_at_every_scale(gated: Any) -> None:
    plain, model, x = gated
    found = class_maps(model, (x,))
    assert len({m.shape[2:] for m in found.maps.values()}) > 1
    weights = {n: m for n, m in model.named_modules() if n in found.maps}
    by_owner = {n.rpartition(".maps")[0]: m for n, m in weights.items()}

    def hook(module: nn.Module, given: Any, y: Tensor, name: str) -> Tensor:
        score = by_owner[name].score
        z = torch.einsum("bchw,kc->bkhw", given[0], score.weight[:, :, 0, 0]) + score.bias[:, None, None]
        a = 1 - z.exp()[:, :1] / z.exp().sum(1, keepdim=True)
        step = a.shape[-1] // y.shape[-1]
        return y * a[..., ::step, ::step]

    convs = {n: m for n, m in plain.named_modules() if n in by_owner}
    assert len(convs) == len(by_owner)
    hooks = [m.register_forward_hook(lambda m, g, y, n=n: hook(m, g, y, n)) for n, m in convs.items()]
    with torch.no_grad():
        expected = logits(plain, x)
    for one in hooks:
        one.remove()
    torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=0)
    assert all(float((m.detach().sum(1) - 1).abs().max()) < 1e-5 for m in found.maps.values())


def test_maps_train_and_background_is_nothing(gated: Any) -> None:
    _, model, x = gated
    _, maps = class_maps(model, (x,))
    masks = mask_pyramid(torch.randint(0, 3, (3, 32, 32)), maps)
    assert {n: m.shape for n, m in masks.items()} == {n: m.shape for n, m in maps.items()}
    assert all(bool((m.sum(1) == 1).all()) for m in masks.values())
    torch.stack([(maps[n] - m).square().mean() for n, m in masks.items()]).sum().backward()
    gates = [p for n, p in model.named_parameters() if ".maps." in n]
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in gates)
    name = next(iter(maps))
    score = model.get_submodule(name).score
    with torch.no_grad():
        before = score.bias.clone()
        score.bias[0] += 1e4
        assert float(class_maps(model, (x,)).maps[name][:, 1:].abs().max()) == 0
        score.bias.copy_(before)
    with pytest.raises(ArgumentError, match="other classes"):
        mask_pyramid(torch.full((3, 32, 32), 3), maps)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(TrainingError, match="no maps"):
        class_maps(nn.Linear(2, 2), (torch.randn(1, 2),))
    with pytest.raises(ArgumentError, match="background"):
        gatecc.recipe("multi-scale-gates", classes=1)
    with pytest.raises(SiteRefusedError, match="pixels"):
        gatecc.transform(nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()), "multi-scale-gates", (torch.randn(2, 3, 9),))
