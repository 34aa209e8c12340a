"""Max-Former: by hand on a ViT of timm, what the early layers read, binary maps, gradients, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.passes.branch.max_pool import MaxPool
from gatecc.passes.loop.neuron import Neuron
from gatecc.recipes.samples import weighted
from tests.recipes.checks import reverted

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
KERNELS, STEPS, THRESHOLD = (3, 5), 3, 0.3


def vit() -> Any:
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return weighted(timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape))


def deit() -> Any:
    """Another library's, with two tokens before the grid."""
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_labels": 5}
    config = transformers.DeiTConfig(**shape, intermediate_size=32, image_size=32, patch_size=8)
    return weighted(transformers.DeiTForImageClassification(config))


def spiking(model: nn.Module, **options: Any) -> Any:
    given = {"kernels": KERNELS, "steps": STEPS, "threshold": THRESHOLD, **options}
    return gatecc.transform(model, gatecc.recipe("max-former", **given), (X,), verify=False)


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Any, Any]]:
    one, other = vit(), deit()
    return {
        "vit": (one, spiking(one, prefix=1)),
        "deit": (other, spiking(other, prefix=2, scale=4.0, sites="model[...].logits")),
    }


class Fired(nn.Module):
    """An integrate-and-fire neuron that keeps its membrane, 0 at first."""

    u: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        u = self.u + x
        fired = (u >= THRESHOLD).to(x.dtype)
        self.u = u - THRESHOLD * fired
        return fired


class Early(nn.Module):
    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.conv, self.fire = mixer.grid.conv, Fired()

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        spikes = self.fire(x)
        cells = spikes[:, 1:].mT.unflatten(-1, (4, 4))
        found = self.conv(cells).flatten(2).mT
        return torch.cat([torch.zeros_like(x[:, :1]), found], 1)


class Late(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.proj, self.fire = attention.qkv, attention.proj, nn.ModuleList(Fired() for _ in range(4))

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (f(t.unflatten(-1, (2, 8))) for f, t in zip(self.fire, self.qkv(x).chunk(3, -1), strict=False))
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k) * 8**-0.5  # no softmax
        return self.proj(self.fire[3](torch.einsum("bhnm,bmhd->bnhd", weights, v)).flatten(2))


class Patches(nn.Module):
    """The patch convolution with the spikes of its map, and the largest of each window."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.fire, self.seen = conv, Fired(), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(self.fire(self.conv(x)), (1, 1, 1, 1))
        windows = padded.unfold(2, 3, 1).unfold(3, 3, 1)
        self.seen.append(windows.amax((-1, -2)))
        return self.seen[-1]


@torch.no_grad()
def test_each_step_by_hand(pairs: dict[str, tuple[Any, Any]]) -> None:
    plain, model = pairs["vit"]
    other = copy.deepcopy(plain)
    other.patch_embed.proj = Patches(other.patch_embed.proj)
    for i, block in enumerate(other.blocks):
        block.attn = Early(model.blocks[i].attn.mixer) if i < len(KERNELS) else Late(block.attn)
        block.mlp.act = Fired()
    expected = torch.stack([other(X) for _ in range(STEPS)]).mean(0)
    assert torch.allclose(model(X), expected, atol=1e-4)
    for spikes in other.patch_embed.proj.seen:  # the pool keeps spikes binary
        assert set(spikes.unique().tolist()) == {0.0, 1.0}
    assert len([m for m in model.modules() if isinstance(m, Neuron)]) == 1 + 2 + 4 + 3


@pytest.mark.broad(2)
@pytest.mark.parametrize("name", ["vit", "deit"])
def test_early_layers_have_no_attention(name: str, pairs: dict[str, tuple[Any, Any]]) -> None:
    plain, model = pairs[name]
    logits = (lambda y: y) if name == "vit" else (lambda y: y.logits)
    before, changed = logits(model(X)), dict[int, bool]()
    read = tuple(f"{name}.weight" for name in "qkv q_proj query k_proj key v_proj value".split())
    for path, p in model.named_parameters():
        if path.endswith(read):
            layer = int(next(part for part in path.split(".") if part.isdigit()))
            with torch.no_grad():
                p.neg_()
                changed[layer] = changed.get(layer, False) or not torch.equal(logits(model(X)), before)
                p.neg_()
    assert changed == {0: False, 1: False, 2: True}
    logits(model.train()(X)).square().mean().backward()
    mixers = {n: p for n, p in model.named_parameters() if ".mixer." in n}
    assert len(mixers) == 4
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in mixers.values())
    reverted(model.eval(), plain, (X,))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ArgumentError, match="fill the grid"):
        spiking(vit(), prefix=0)
    for wrong in ({"kernels": (2,)}, {"pool": 2}, {"steps": 0}, {"scale": -1.0}, {"threshold": 0.0}):
        with pytest.raises(ArgumentError):
            gatecc.recipe("max-former", **wrong)
    with pytest.raises(SiteRefusedError, match="map of features"):
        gatecc.transform(vit(), gatecc.Branch(gatecc.MLP[...].out, MaxPool(3), op="lerp"), (X,))
    with pytest.raises(SiteRefusedError, match="no such activation"):
        spiking(vit(), prefix=1, replaces=("relu",))
