"""Gated-SwinRMT against its equations over pairs of places, on windows written by hand and on timm's Swin."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.errors import SiteRefusedError
from gatecc.passes.mix.windows import grid
from tests.ir.match.found import find
from tests.recipes.checks import gradients, new_parameters, randomise, reverted

HEADS, HEAD, SIDE = 2, 4, 2
WIDTH = HEADS * HEAD
X = torch.randn(3, 4, 4, WIDTH, generator=torch.Generator().manual_seed(7))


class Windows(nn.Module):
    """Shifted 2 x 2 windows with a learned bias and, by ``masked``, the mask of a shift. (B, 4, 4, C) -> the same."""

    mask: Tensor

    def __init__(self, masked: str = "regions", side: int = SIDE) -> None:
        super().__init__()
        self.side, self.masked = side, masked
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(HEADS, side * side, side * side))
        self.register_buffer("mask", self._mask())

    def _mask(self) -> Tensor:
        """(windows, N, N)"""
        region = torch.tensor([[0, 0, 0, 1]] * 3 + [[2, 2, 2, 3]])
        labels = _cut(region[None, :, :, None], self.side)[..., 0]
        far = labels[:, :, None] != labels[:, None]
        if self.masked == "neighbours":  # each place sees those beside it, not across
            at = torch.arange(self.side)
            y, x = at.repeat_interleave(self.side), at.repeat(self.side)
            distance = (y[:, None] - y).abs() + (x[:, None] - x).abs()
            far = (distance > 1).expand(len(labels), -1, -1)
        return torch.zeros(far.shape).masked_fill(far, -100.0)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (windows, H, N, D)"""
        bias = self.table
        if self.masked != "none":
            times = q.size(0) // self.mask.size(0)
            bias = bias + self.mask.unsqueeze(1).repeat(times, 1, 1, 1)
        return ((q @ k.mT) * HEAD**-0.5 + bias).softmax(-1) @ v

    def at(self, name: str, value: Tensor, x: Tensor) -> Tensor:
        """For the reference."""
        return value

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[1:] == (4, 4, WIDTH)
        x = _cut(image.roll((-1, -1), (1, 2)), self.side)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        heads = self.at("heads", self.mix(q, k, self.at("v", v, x)), x)
        y = self.proj(heads.transpose(1, 2).flatten(2))
        return image + _joined(y, self.side).roll((1, 1), (1, 2))


def _cut(x: Tensor, side: int) -> Tensor:
    """(B, 4, 4, C) -> (B windows, N, C)"""
    x = x.view(-1, 4 // side, side, 4 // side, side, x.size(-1))
    return x.transpose(2, 3).reshape(-1, side * side, x.size(-1))


def _joined(y: Tensor, side: int) -> Tensor:
    y = y.unflatten(1, (side, side)).unflatten(0, (-1, 4 // side, 4 // side))
    return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _places(side: int) -> tuple[Tensor, Tensor]:
    """|y - y'| and |x - x'| of all pairs."""
    pairs = [(divmod(i, side), divmod(j, side)) for i in range(side * side) for j in range(side * side)]
    dy, dx = (torch.tensor([abs(a[i] - b[i]) for a, b in pairs]).view(side**2, side**2) for i in (0, 1))
    return dy, dx


def by_pairs(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sigmoid: bool, split: bool, first: float) -> Tensor:
    """The mixer as matrices over all pairs of places. q, k, v: (W, H, N, D), seen: (W, 1, N, N)"""
    heads, side = q.size(1), round(q.size(2) ** 0.5)
    gamma = torch.tensor([1 - 2.0 ** -(first + 4.0 * h / heads) for h in range(heads)]).view(-1, 1, 1)
    slope = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]).view(-1, 1, 1)
    scores = q @ k.mT * q.size(-1) ** -0.5
    dy, dx = _places(side)

    def weights(distance: Tensor, among: Tensor) -> Tensor:
        if sigmoid:
            made = torch.sigmoid(scores - slope * distance) * gamma**distance
            return made * (among & seen)
        made = scores.exp() * gamma**distance * (among & seen)
        return made / made.sum(-1, keepdim=True)

    if not split:
        return weights(dx + dy, torch.ones_like(dx, dtype=torch.bool)) @ v
    return weights(dy, dx == 0) @ (weights(dx, dy == 0) @ v)


def _local(v: Tensor, weight: Tensor) -> Tensor:
    """The convolution place by place. v: (W, H, N, D), weight: (H D, 1, K, K)"""
    side, reach = round(v.size(2) ** 0.5), weight.size(-1) // 2
    kernel = weight.view(v.size(1), v.size(3), weight.size(-1), weight.size(-1))
    out = torch.zeros_like(v)
    for i in range(v.size(2)):
        for j in range(v.size(2)):
            (y, x), (other_y, other_x) = divmod(i, side), divmod(j, side)
            dy, dx = other_y - y + reach, other_x - x + reach
            if 0 <= dy < kernel.size(-1) and 0 <= dx < kernel.size(-1):
                out[:, :, i] += kernel[:, :, dy, dx] * v[:, :, j]
    return out


def windows(**options: Any) -> Windows:
    torch.manual_seed(0)
    return Windows(**options).eval()


def hand(plain: Windows, model: Any, form: str, split: bool) -> Windows:
    """The transformed model in Python."""
    other = copy.deepcopy(plain)

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = plain.mask.eq(0).unsqueeze(1).repeat(q.size(0) // plain.mask.size(0), 1, 1, 1)
        mixed = by_pairs(q, k, v, seen, form == "swat", split, 2.0)
        return mixed if form == "swat" else mixed + _local(v, model.mixer.local)

    def at(name: str, value: Tensor, x: Tensor) -> Tensor:
        if name == "v":
            return value if form != "swat" else value * _heads(F.silu(x @ model.swish.weight.T))
        return value * 2 * _heads(torch.sigmoid(x @ model.gate.weight.T + model.gate.bias))

    vars(other).update(mix=mix, at=at)  # on the object, before the methods of its class
    return other


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, HEAD)).transpose(1, 2)


@pytest.mark.parametrize(("form", "split"), [("retention", True), ("retention", False), ("swat", True)])
def test_it_is_its_equations_over_pairs(form: str, split: bool, tmp_path: Path) -> None:
    plain = windows()
    recipe = gatecc.recipe("gated-swinrmt", form=form, split=split, local=3 if form == "retention" else 5)
    model = gatecc.transform(plain, recipe, (X,), scope="model", verify=False)
    new = new_parameters(model, plain)
    randomise(new.values(), 0.5)
    with torch.no_grad():
        for x in (X, X[:2]):
            assert float((model(x) - hand(plain, model, form, split)(x)).abs().max()) <= 1e-5
    gradients(model, new, model(X))
    if split:
        gatecc.save(model, tmp_path)
        assert torch.equal(gatecc.load(windows(), tmp_path)(X), model(X))
    reverted(model, plain, (X,))


def test_no_decay_is_attention_without_its_bias() -> None:
    plain = windows()
    nn.init.zeros_(plain.table)
    model = gatecc.transform(
        plain, gatecc.recipe("gated-swinrmt", initial=60.0, spread=0.0, split=False), (X,), verify=False
    )
    assert torch.allclose(model(X), plain(X), atol=1e-6)
    assert model.get_parameter("table").grad is None
    model(X).sum().backward()
    assert model.get_parameter("table").grad is None, "the bias takes part no more"


def test_a_neighbourhood_cannot_be_split() -> None:
    with pytest.raises(SiteRefusedError, match="regions"):
        gatecc.transform(windows(masked="neighbours"), "gated-swinrmt", (X,))
    model = gatecc.transform(
        windows(masked="neighbours"), gatecc.recipe("gated-swinrmt", split=False), (X,), verify=False
    )
    changed = X.clone()
    changed[:, 0, 0] += 1  # rolled to the last place of the last window: it is seen there from beside only
    with torch.no_grad():
        moved = ((model(changed) - model(X)).abs().amax((0, -1)) > 1e-7).nonzero().tolist()
    assert moved == [[0, 0], [0, 3], [3, 0]]


def test_the_grid_of_a_window() -> None:
    (site,) = find(windows(), X).sites("attention")
    owner: Any = nn.Module()
    assert grid(owner, 9, site) == (3, 3)
    owner.window_size = 4
    assert grid(owner, 16, site) == (4, 4)
    owner.window_size = [2, 8]
    assert grid(owner, 16, site) == (2, 8)
    for tokens in (15, None):
        with pytest.raises(SiteRefusedError, match="no grid of places"):
            grid(owner, tokens, site)


def test_a_learned_bias_goes_with_the_softmax_for_other_mixers_too() -> None:
    plain = windows(masked="none")
    recipe = gatecc.recipe("gla", gate=False)
    with pytest.raises(SiteRefusedError, match="differs between"):
        gatecc.transform(windows(), recipe, (X,), scope="model")
    model = gatecc.transform(plain, recipe, (X,), scope="model", verify=False)
    model(X).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["table"]


def test_what_it_does_not_fit_is_refused() -> None:
    class Tokens(nn.Module):
        """Causal attention, or one over a number of tokens that varies."""

        def __init__(self, causal: bool) -> None:
            super().__init__()
            self.qkv, self.causal = nn.Linear(WIDTH, 3 * WIDTH), causal

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)

    with pytest.raises(SiteRefusedError, match="manhattan cannot take the place"):
        gatecc.transform(Tokens(True), "gated-swinrmt", (X.flatten(1, 2),))
    with pytest.raises(SiteRefusedError, match="no grid of places"):
        gatecc.transform(Tokens(False), "gated-swinrmt", (X.flatten(1, 2)[:, :15],))
    with pytest.raises(gatecc.GateccError, match="unknown form"):
        gatecc.recipe("gated-swinrmt", form="other")


def test_swin_with_shifted_windows() -> None:
    """timm's Swin with both kinds of blocks, against the same model with Python attention."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (2,), "num_heads": (2,)}
    plain: Any = timm.create_model("swin_tiny_patch4_window7_224", window_size=4, num_classes=3, **shape).eval()
    images = torch.randn(2, 3, 16, 16)
    model: Any = gatecc.transform(plain, "gated-swinrmt", (images,), verify=False)
    new = new_parameters(model, plain)
    assert {name.rpartition("attn.")[2] for name in new} == {"mixer.local", "gate.weight", "gate.bias"}
    randomise(new.values(), 0.5)
    other: Any = copy.deepcopy(plain)
    for attn, block in ((b.attn, model.layers[0].blocks[i].attn) for i, b in enumerate(other.layers[0].blocks)):

        def forward(x: Tensor, mask: Tensor | None = None, attn: Any = attn, block: Any = block) -> Tensor:
            q, k, v = attn.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            seen = torch.ones(len(x), 1, 16, 16, dtype=torch.bool)
            if mask is not None:
                seen = (mask > -1).repeat(len(x) // len(mask), 1, 1).unsqueeze(1)
            heads = by_pairs(q, k, v, seen, False, True, 2.0) + _local(v, block.mixer.local)
            gate = 2 * torch.sigmoid(x @ block.gate.weight.T + block.gate.bias)
            return attn.proj(heads.transpose(1, 2).flatten(2) * gate)

        attn.forward = forward
    assert torch.allclose(model(images), other(images), atol=1e-5)
    gradients(model, new, model(images))
