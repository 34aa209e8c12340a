"""D²iT: tokens of two grains by hand, on a ViT of timm and a diffusion transformer of diffusers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.passes.grains import entropies, mixed, ordered, spread
from gatecc.recipes.samples import weighted
from tests.recipes.checks import reverted

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
X[0, :, :16] *= 0.05  # flat above
LATENT = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
GRAIN = torch.randn(2, 16, generator=torch.Generator().manual_seed(7))


def vit(**more: Any) -> Any:
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, **more}
    return weighted(timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape))


class Denoiser(nn.Module):
    """A diffusion transformer with an input for a map of grains."""

    def __init__(self) -> None:
        super().__init__()
        diffusers: Any = pytest.importorskip("diffusers")
        shape: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2}
        self.net: Any = diffusers.DiTTransformer2DModel(**shape, sample_size=8, patch_size=1, num_embeds_ada_norm=10)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor, grain: Tensor) -> Tensor:
        return self.net(x, timestep=timestep, class_labels=label, return_dict=False)[0]


class Apart(nn.Module):
    """The blocks, for each sample alone on the tokens of its grains, region by region."""

    def __init__(self, blocks: Any, scores: Tensor, fine: int, before: int) -> None:
        super().__init__()
        self.blocks, self.before = list(blocks), before
        self.norm1 = getattr(blocks[0], "norm1", None)  # the output layer of a DiT reads its embedding
        self.fine = [set(row.topk(fine).indices.tolist()) for row in scores]
        self.counts = list[int]()

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        return torch.cat([self.one(x[b : b + 1], b, given) for b in range(len(x))])

    def one(self, x: Tensor, b: int, given: dict[str, Any]) -> Tensor:
        cells = x[0, self.before :].view(4, 2, 4, 2, -1)
        tokens, places = [x[0, : self.before]], list[tuple[int, int, int]]()
        for r in range(16):
            region = cells[r // 4, :, r % 4].reshape(4, -1)
            places.append((r // 4, r % 4, 4 if r in self.fine[b] else 1))
            tokens.append(region if places[-1][2] == 4 else region.mean(0, keepdim=True))
        y = torch.cat(tokens)[None]
        self.counts.append(y.size(1))
        mine = {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in given.items()}
        for block in self.blocks:
            y = block(y, **mine)
        out, at = torch.zeros_like(cells), self.before
        for row, column, count in places:
            out[row, :, column] = y[0, at : at + count].expand(4, -1).reshape(2, 2, -1)
            at += count
        return torch.cat([y[0, : self.before], out.view(64, -1)])[None]


@pytest.mark.parametrize("fine", [4, 16, 0])
@torch.no_grad()
def test_an_image_classifier_by_hand(fine: int) -> None:
    plain = vit()
    model: Any = gatecc.transform(plain, gatecc.recipe("d2it", ratio=fine / 16), (X,))
    if fine == 16:
        assert torch.equal(model(X), plain(X))  # all fine: the model with one rate
        return
    other = copy.deepcopy(plain)
    apart = Apart(other.blocks, entropies(X, (4, 4), 32), fine, 1)
    other.blocks = nn.Sequential(apart)
    assert torch.allclose(model(X), other(X), atol=1e-5)
    assert torch.allclose(model(X[1:]), model(X)[1:], atol=1e-5)  # a sample does not see the others
    assert apart.counts == [1 + 4 * fine + (16 - fine)] * 2
    if fine:
        assert min(apart.fine[0]) >= 8  # the flat half is coarse
    totals = gatecc.last_report(model).totals
    assert totals.flops_before is not None
    assert totals.flops_after is not None
    assert totals.flops_after < 0.5 * totals.flops_before
    reverted(model, plain, (X,))


def test_a_diffusion_transformer_with_a_map_of_grains_by_hand() -> None:
    plain, given = weighted(Denoiser()), (LATENT, torch.tensor([3, 500]), torch.tensor([1, 2]), GRAIN)
    model: Any = gatecc.transform(plain, gatecc.recipe("d2it", ratio=0.25, map="grain"), given, verify=False)
    other: Any = copy.deepcopy(plain)
    apart = Apart(other.net.transformer_blocks, GRAIN, 4, 0)
    other.net.transformer_blocks = nn.ModuleList([apart])
    assert torch.allclose(model(*given), other(*given), atol=1e-4)
    assert apart.counts == [4 * 4 + 12] * 2
    model(*given).square().mean().backward()
    trained = [p.grad for n, p in model.named_parameters() if "transformer_blocks" in n and p.grad is not None]
    assert len(trained) > 10
    assert all(grad.isfinite().all() for grad in trained)


def test_entropy_and_places() -> None:
    flat, noise = torch.full((1, 1, 8, 8), 0.5), torch.rand(1, 1, 8, 8)
    image = torch.cat([torch.cat([flat, noise], 3), torch.cat([noise * 0.1, flat], 3)], 2)
    found = entropies(image, (2, 2), 16)[0]
    assert found.argsort(descending=True)[:2].tolist() == [1, 2]
    grey = (image[0, 0] - image.min()) / (image.max() - image.min())
    p = torch.histc(grey[:8, 8:], 16, 0, 1) / 64
    assert float(found[1]) == pytest.approx(float(torch.special.entr(p).sum()), abs=1e-5)
    x, order = torch.randn(3, 2 + 24, 5), ordered(torch.randn(3, 6), 6)
    assert torch.equal(spread(mixed(x, order, 6, (2, 3), 2), order, 6, (2, 3), 2), x)  # all fine: nothing moves


def test_bad_input_is_refused() -> None:
    for wrong in ({"ratio": 1.5}, {"ratio": -0.1}, {"size": 1}, {"grid": (4,)}, {"sites": "mlp[...]"}):
        with pytest.raises(ArgumentError):
            gatecc.recipe("d2it", **wrong)
    with pytest.raises(SiteRefusedError, match="cut into regions"):
        gatecc.transform(vit(), gatecc.recipe("d2it", size=3), (X,))
    with pytest.raises(SiteRefusedError, match="no scores"):
        gatecc.transform(vit(), gatecc.recipe("d2it", map="x"), (X,))
    shape: dict[str, Any] = {"img_size": 28, "patch_size": 7, "depth": 2, "embed_dim": 16, "num_heads": 2}
    rotary = timm.create_model("eva02_tiny_patch14_224", **shape)
    with pytest.raises(SiteRefusedError, match="fewer tokens"):
        gatecc.transform(rotary.eval(), gatecc.recipe("d2it"), (torch.randn(2, 3, 28, 28),))
