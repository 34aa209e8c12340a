"""Dyn-Perceiver: exits on latent codes that read the features of a model of timm and write to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.capture.flops import counted
from gatecc.train import calibrate, exit_logits, exits, fit_exits, geometric_shares


def vit() -> tuple[nn.Module, Tensor]:
    timm: Any = pytest.importorskip("timm")
    shape: Any = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **shape).eval(), torch.randn(8, 3, 16, 16)


def resnet() -> tuple[nn.Module, Tensor]:
    """Its features are maps, of other sizes and widths from stage to stage."""
    timm: Any = pytest.importorskip("timm")
    shape: Any = {"layers": (2, 2, 1, 1), "channels": (8, 16, 24, 32), "num_classes": 4, "in_chans": 3}
    return timm.create_model("resnet18", **shape).eval(), torch.randn(8, 3, 32, 32)


def attend(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    """Cross-attention head by head."""
    q, (k, v) = layer.q(layer.norm(x)), layer.kv(layer.given_norm(y)).chunk(2, -1)
    heads = [
        torch.softmax(a @ b.mT / a.size(-1) ** 0.5, -1) @ c
        for a, b, c in zip(*(t.chunk(layer.heads, -1) for t in (q, k, v)), strict=True)
    ]
    return layer.out(torch.cat(heads, -1))


def by_hand(stages: list[Any], features: list[Tensor]) -> list[Tensor]:
    """The logits of the exits from features (B, M, C) that nobody writes to."""
    z, found = stages[0].codes.expand(features[0].size(0), -1, -1), list[Tensor]()
    for stage, x in zip(stages, features, strict=True):
        z = z + attend(stage.read, z, x)
        z = z + stage.mlp(stage.norm(z))
        found.append(stage.out(stage.last(z).mean(1)))
    return found


@pytest.mark.broad(2)
@pytest.mark.parametrize("make", [vit, resnet])
def test_the_branch_is_its_equations_and_samples_leave_by_quantiles(make: Any) -> None:
    torch.manual_seed(0)
    model, x = make()
    made: Any = gatecc.transform(model, gatecc.recipe("dyn-perceiver", codes=3, width=16, heads=2), (x,))
    at = [name for name, module in made.named_modules() if hasattr(module, "exit_head")]
    heads = [made.get_submodule(name).exit_head for name in at]
    features = list[Tensor]()
    for name in at:
        block = model.get_submodule(name)
        block.register_forward_hook(lambda m, a, y: features.append(y.flatten(2).mT if y.dim() == 4 else y))
    with torch.no_grad():
        before = model(x)
        assert torch.equal(made(x), before)
        *early, final = exit_logits(made, x)
        for found, expected in zip(early, by_hand(heads, features), strict=True):
            assert torch.allclose(found, expected, atol=1e-5)
        assert torch.equal(final, before)
    y = torch.arange(8) % 4
    fit_exits(made, [(x, y)], steps=6, distill=0.5)
    assert all(float(h.write.out.weight.detach().abs().sum()) > 0 for h in heads)  # it has learned to write
    with torch.no_grad():
        shares = geometric_shares(1.0, len(heads))
        chosen = calibrate(made, [(x, y)], by="quantile", share=shares).chosen
        assert chosen.shares[0] == pytest.approx(1 / (len(heads) + 1), abs=1 / 8)
        logits = exit_logits(made, x)
        sure = torch.stack([F.softmax(z, -1).amax(-1) for z in logits[:-1]], -1)
        leaves = sure >= torch.stack([rule.threshold for rule in exits(made)])
        first = torch.cat([leaves, torch.ones(8, 1, dtype=torch.bool)], -1).int().argmax(-1)
        assert len(set(first.tolist())) > 1
        out, spent = counted(lambda: made(x))
        assert torch.allclose(out, torch.stack([logits[int(k)][i] for i, k in enumerate(first)]), atol=1e-5)
        exits(made)[0].threshold.fill_(-1.0)
        assert counted(lambda: made(x))[1] < spent
