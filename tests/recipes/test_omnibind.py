"""OmniBind on the embeddings of real encoders of different widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from tests.passes.ensemble.models import PIXELS, images


class Trunk(nn.Module):
    """The paper's router but for its last layer: batch norms on the embeddings of all spaces."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh()
        )

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.layers(torch.cat([one, other], -1))


@pytest.fixture(scope="module")
def plain() -> gatecc.Ensemble:
    torch.manual_seed(0)
    import timm
    from transformers import ViTModel

    vit = ViTModel(images().members["vit"].config, add_pooling_layer=False)  # pyright: ignore[reportArgumentType] - a config
    resnet = timm.create_model("resnet18", num_classes=0, channels=(8, 8, 8, 12), stem_width=8)
    projectors = {"vit": Mean(16, 6), "resnet": nn.Linear(12, 6)}
    return gatecc.ensemble(
        {"vit": vit, "resnet": resnet},
        {"pixel_values": PIXELS},
        inputs={"resnet": {"x": "pixel_values"}, "trunk": {"one": "vit", "other": "resnet"}},
        output={"vit": "last_hidden_state"},
        project=projectors,
        features={"trunk": Trunk(12)},
    ).eval()


class Mean(nn.Module):
    """(B, N, C) -> (B, D)"""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(1))


@pytest.mark.parametrize("reads", ["members", "trunk"])
def test_the_equation_and_unit_norms(plain: gatecc.Ensemble, reads: str) -> None:
    model: Any = gatecc.transform(
        plain, gatecc.recipe("omnibind", reads=reads, hidden=8), {"pixel_values": PIXELS}, verify=False
    )
    router = model.router
    with torch.no_grad():
        router.weight.normal_()
        vit = plain.members["vit"](PIXELS).last_hidden_state.mean(1)
        one = F.linear(vit, plain.projections["vit"].linear.weight, plain.projections["vit"].linear.bias)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue] - the linear of Mean
        other = plain.projections["resnet"](plain.members["resnet"](PIXELS))
        read = torch.cat([one, other], -1) if reads == "members" else plain.features["trunk"](one, other)
        hidden = torch.tanh(read @ router.hidden_weight.T + router.hidden_bias)
        weights = torch.sigmoid(hidden @ router.weight.T + router.bias)
        hand = weights[:, :1] * one + weights[:, 1:] * other
        out = model(PIXELS)
        assert torch.allclose(out, hand / hand.norm(dim=-1, keepdim=True), atol=1e-5)
        assert torch.allclose(out.norm(dim=-1), torch.ones(5), atol=1e-6)
        router.weight.zero_()
        router.bias.copy_(torch.tensor([-1e4, 1e4]))
        assert torch.allclose(model(PIXELS), F.normalize(other, dim=-1), atol=1e-6)


def test_frozen_projectors_stay_frozen(plain: gatecc.Ensemble) -> None:
    model: Any = gatecc.transform(plain, gatecc.recipe("omnibind", hidden=8), {"pixel_values": PIXELS}, verify=False)
    model.requires_grad_(False)
    model.router.requires_grad_(True)
    model(PIXELS)[:, 0].sum().backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"router"}
