"""MLP sites: forms, owners and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ir.match.found import Found, Lambda, find

X = torch.randn(2, 5, 6)


class MLP(nn.Module):
    """The spellings of a feed-forward network. x: (B, N, 6)"""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.up, self.gate, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.both, self.norm = nn.Linear(6, 16), nn.LayerNorm(8)
        self.dw = nn.Conv2d(8, 8, 3, 1, 1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(getattr(self, self.form)(x))

    def plain(self, x: Tensor) -> Tensor:
        return F.dropout(F.gelu(self.up(x)), 0.1, self.training)

    def normed(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.up(x)))

    def gated(self, x: Tensor) -> Tensor:
        return self.up(x) * F.silu(self.gate(x))

    def bilinear(self, x: Tensor) -> Tensor:
        return self.up(x) * self.gate(x)

    def fused(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return F.gelu(gate) * up

    def glu(self, x: Tensor) -> Tensor:
        return F.glu(self.both(x), -1)

    def depthwise(self, x: Tensor) -> Tensor:
        h = self.up(x).transpose(1, 2)
        return F.gelu(self.dw(h.unflatten(2, (x.shape[1], 1))).flatten(2).transpose(1, 2))

    def flattened(self, x: Tensor) -> Tensor:
        return F.relu(self.up(x.reshape(-1, 6))).view(*x.shape[:-1], 8)


FORMS = {
    "plain": ("plain", "gelu", {"up": "up", "down": "down"}),
    "normed": ("plain", "relu", {"up": "up", "down": "down"}),
    "gated": ("gated", "silu", {"gate": "gate", "up": "up", "down": "down"}),
    "bilinear": ("gated", "", {"gate": "up", "up": "gate", "down": "down"}),
    "fused": ("gated", "gelu", {"gate_up": "both", "down": "down"}),
    "glu": ("gated", "glu", {"gate_up": "both", "down": "down"}),
    "depthwise": ("plain", "gelu", {"up": "up", "down": "down"}),
}


def block(form: str) -> nn.Module:
    return Lambda(lambda m, x: x + m.ffn(m.norm(x)), ffn=MLP(form), norm=nn.LayerNorm(6))


def check(found: Found) -> None:
    """The values and weights of every site reproduce its output."""
    for site in found.sites("mlp"):
        bias = found.parameter(site.weights["down"].bias).detach()
        torch.testing.assert_close(
            found.value(site, "hidden") @ found.matrix(site, "down").mT + bias, found.value(site, "out")
        )


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    form, activation, weights = FORMS[name]
    found = find(block(name), X)
    (site,) = found.sites("mlp")
    assert (site.key, site.form, site.activation) == ("ffn#0", form, activation)
    assert {role: w.fqn for role, w in site.weights.items()} == {r: f"ffn.{p}.weight" for r, p in weights.items()}
    assert found.axes(site) == {"in": "bnc", "hidden": "bnc", "out": "bnc"}
    check(found)


def test_the_gate_is_the_activated_half() -> None:
    found = find(block("gated"), X)
    (site,) = found.sites("mlp")
    x = found.value(site, "in")
    half = {
        role: F.linear(x, found.matrix(site, role), found.parameter(site.weights[role].bias)) for role in ("gate", "up")
    }
    torch.testing.assert_close(F.silu(half["gate"]) * half["up"], found.value(site, "hidden"))


def test_the_owner_is_the_smallest_module_that_holds_it() -> None:
    class Bert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.intermediate = nn.ModuleDict({"dense": nn.Linear(6, 8)})
            self.output = nn.ModuleDict({"dense": nn.Linear(8, 6)})

        def forward(self, x: Tensor) -> Tensor:
            return x + self.output["dense"](F.gelu(self.intermediate["dense"](x)))

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 6)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](F.relu(self.layers[0](x)))

    model = nn.Sequential(Bert(), Listed(), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)))
    assert find(model, X).owners("mlp") == ["0", "1", "2"]  # a ModuleList runs nothing and owns nothing


def test_bare_parameters_of_either_orientation() -> None:
    def model(m: Any, x: Tensor) -> Tensor:
        return F.relu(x @ m.w1) @ m.w2.T

    parts = dict(w1=nn.Parameter(torch.randn(6, 8)), w2=nn.Parameter(torch.randn(6, 8)))
    (site,) = find(Lambda(model, **parts), X).sites("mlp")
    assert {role: w.orientation for role, w in site.weights.items()} == {"up": "in_out", "down": "out_in"}


def test_convolutions() -> None:
    layers = (
        nn.Conv2d(6, 12, 1),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 12, 3, 1, 1, groups=12),
        nn.GELU(),
        nn.Conv2d(12, 6, 1),
    )
    found = find(Lambda(lambda m, x: x + m.ffn(x), ffn=nn.Sequential(*layers)), torch.randn(2, 6, 8, 8))
    (site,) = found.sites("mlp")
    assert (site.owner, site.values["in"].axes, site.weights["down"].orientation) == ("ffn", "bcyx", "conv")


def test_an_mlp_over_tokens_names_the_axes_as_they_are() -> None:
    """MLP-Mixer: the projections run over n, the features stay in place."""
    ffn = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 5))
    found = find(Lambda(lambda m, x: x + m.ffn(m.norm(x).mT).mT, ffn=ffn, norm=nn.LayerNorm(6)), X)
    (site,) = found.sites("mlp")
    assert found.axes(site) == {"in": "bcn", "hidden": "bcn", "out": "bcn"}
    assert found.axes(found.sites("residual")[0]) == {"skip": "bnc", "branch": "bnc", "out": "bnc"}


def test_two_calls_of_one_mlp_are_two_sites() -> None:
    found = find(Lambda(lambda m, x: m.ffn(m.norm(m.ffn(x))), ffn=MLP("plain"), norm=nn.LayerNorm(6)), X)
    assert [site.key for site in found.sites("mlp")] == ["ffn#0", "ffn#0@1"]


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


def stem(m: Any, x: Tensor) -> Tensor:
    """Whisper: two convolutions before the encoder."""
    return F.gelu(m.b(F.gelu(m.a(x))))


def positions(m: Any, x: Tensor) -> Tensor:
    """Swin v2: an MLP makes the bias of every window from coordinates."""
    return x + m.ffn(torch.arange(12.0).view(1, 2, 6)).sum()


VGG = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
SAM = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6))
IMAGE = torch.randn(2, 6, 8, 8)

LOOK_ALIKES: dict[str, tuple[nn.Module, Tensor, list[str]]] = {
    "vgg classifier": (VGG, X, ["GCC140"]),
    "sam decoder head": (SAM, X, ["GCC140"]),
    "classifier": (nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)), X, ["GCC141"]),
    "squeeze and excite": (SqueezeExcite(), IMAGE, ["GCC142"]),
    "strided": (
        nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.ReLU(), nn.Conv2d(8, 6, 1)),
        IMAGE,
        ["GCC141"],
    ),
    "position mlp": (Lambda(positions, ffn=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))), X, ["GCC143"]),
    "whisper stem": (Lambda(stem, a=nn.Conv1d(5, 8, 3, 1, 1), b=nn.Conv1d(8, 8, 3, 2, 1)), X, []),
    "resnet block": (nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1)), IMAGE, []),
    "low rank": (nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6)), X, []),
    "residual between": (
        Lambda(lambda m, x: m.b(F.relu(m.a(x)) + x), a=nn.Linear(6, 6), b=nn.Linear(6, 6)),
        X,
        [],
    ),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes(name: str) -> None:
    model, x, codes = LOOK_ALIKES[name]
    found = find(model, x)
    assert not found.sites("mlp")
    assert found.codes("mlp") == codes


def test_squeeze_and_excite_inside_does_not_hide_the_mlp() -> None:
    """MobileNetV3's inverted residual."""
    body = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Hardswish(), SqueezeExcite(), nn.Conv2d(6, 6, 1))
    found = find(Lambda(lambda m, x: x + m.body(x), body=body), IMAGE)
    assert found.owners("mlp") == ["body"]
    assert found.codes("mlp") == ["GCC142"]
