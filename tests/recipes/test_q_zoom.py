"""Q-Zoom on models of timm and transformers: who looks again is each sample's own, and what it sees is the region."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gatecc
from gatecc.capture.flops import counted
from gatecc.errors import ArgumentError, SiteRefusedError, TrainingError
from gatecc.train import TwoScales, fit_zoom
from gatecc.train.zoom import passes, twig_of


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    shape: Any = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    shape |= {"image_size": 16, "patch_size": 4, "num_labels": 4}
    return ViTForImageClassification(ViTConfig(**shape))


def resnet() -> Any:
    """Maps rather than tokens, batch norms, and activations in place."""
    timm: Any = pytest.importorskip("timm")
    shape: Any = {"layers": (2, 1, 1, 1), "channels": (8, 8, 8, 8), "num_classes": 4}
    return timm.create_model("resnet18", **shape)


@pytest.fixture(scope="module", params=[vit, resnet])
def zooming(request: Any) -> tuple[Any, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    size = 16 if request.param is vit else 32
    plain, fine = request.param().eval(), torch.randn(5, 3, 2 * size, 2 * size)
    image = F.avg_pool2d(fine, 2)
    return plain, gatecc.transform(TwoScales(plain), "q-zoom", (image, fine)), image, fine


def logits(model: Any, x: Tensor) -> Tensor:
    found = model(x)
    return found if isinstance(found, Tensor) else found.logits


def boxes(model: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """The twig's scores and centres, seen from outside."""
    twig, seen = twig_of(model), list[Any]()
    hook = twig.register_forward_hook(lambda module, given, result: seen.append((given[0], result[1])))
    model(image, torch.zeros(*image.shape[:2], *(2 * s for s in image.shape[2:])))
    hook.remove()
    return torch.sigmoid(twig.looked(seen[0][0])[0]), seen[0][1]


@pytest.mark.broad(2)
@torch.no_grad()
def test_each_sample_decides_by_itself_and_sees_its_region(zooming: Any) -> None:
    plain, model, image, fine = zooming
    assert torch.equal(model(image, fine), logits(plain, image))  # nobody looks again
    twig = twig_of(model)
    twig.key.weight.mul_(20)  # regions apart
    twig.gate.weight.mul_(20)
    scores, centres = boxes(model, image)
    order = scores.sort().values
    twig.threshold.fill_(float(order[2:4].mean()))
    zooms = scores >= twig.threshold
    assert int(zooms.sum()) == 2
    coarse, found = logits(plain, image), model(image, fine)
    theta = torch.zeros(5, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 0.5
    theta[:, :, 2] = centres
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    region = F.grid_sample(fine, grid, padding_mode="border", align_corners=False)
    expected = torch.where(zooms[:, None], (coarse + logits(plain, region)) / 2, coarse)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for i in range(5):  # a sample alone, and in another batch, does the same
        torch.testing.assert_close(model(image[i : i + 1], fine[i : i + 1]), found[i : i + 1], atol=1e-5, rtol=0)
    _, some = counted(lambda: model(image, fine))
    twig.threshold.fill_(-1.0)
    _, every = counted(lambda: model(image, fine))
    twig.threshold.fill_(2.0)
    _, none = counted(lambda: model(image, fine))
    assert (some - none) / (every - none) == pytest.approx(2 / 5, rel=1e-6)
    masked: Any = torch.export.export(model, (image, fine)).module()
    twig.threshold.fill_(float(order[2:4].mean()))
    masked_twig = next(b for n, b in masked.named_buffers() if n.endswith("threshold"))
    masked_twig.copy_(twig.threshold)
    torch.testing.assert_close(masked(image, fine), found, atol=1e-5, rtol=0)
    twig.threshold.fill_(2.0)


def test_the_twig_learns_on_the_frozen_model(zooming: Any) -> None:
    plain, model, image, fine = zooming
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = passes(model, (image, fine))
    assert found.fine.requires_grad
    labels = found.fine.argmax(-1)
    losses = fit_zoom(model, [((image, fine), labels)], steps=8, lr=1e-2)
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(".twig." in n for n in moved)
    assert float(twig_of(model).threshold) == 0.5
    with pytest.raises(TrainingError, match="q-zoom"):
        fit_zoom(plain, [((image,), labels)], steps=1)


def test_what_cannot_be_is_refused() -> None:
    image, fine = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 32, 32)
    with pytest.raises(ArgumentError, match="share"):
        gatecc.recipe("q-zoom", share=0.0)
    with pytest.raises(ArgumentError, match="block"):
        gatecc.recipe("q-zoom", sites="head[0]")
    with pytest.raises(SiteRefusedError, match="TwoScales"):
        gatecc.transform(TwoScales(vit()).eval(), "q-zoom", (image, fine[:, :1]))
    with pytest.raises(SiteRefusedError, match="grid"):
        gatecc.transform(TwoScales(vit()).eval(), gatecc.recipe("q-zoom", grid=(5, 5)), (image, fine))
