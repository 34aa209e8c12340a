"""Tiny: a transformer in which every place that a recipe gates is a call of ``self.at``.

It returns the value as it is. A reference is a second Tiny with the same weights that is gated in Python by a function
``at(place, layer, value, **seen)``, which does by hand what the recipe should do; ``seen`` holds what a gate may read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, KV_HEADS, HEAD = 16, 4, 2, 4

At = Callable[..., Tensor]


class Place(nn.Module):
    """A module with places to gate.

    Only a reference reads which layer it is: the layers of a plain model share their captures.
    """

    layer = 0
    steps = 1  # how often the module comes to its places
    gated_by: At | None = None

    def at(self, place: str, value: Tensor, number: int = 0, **seen: Tensor) -> Tensor:
        if self.gated_by is None:
            return value
        return self.gated_by(place, self.steps * self.layer + number, value, **seen)


class Attention(Place):
    """Grouped-query attention, spelled out or fused. x: (B, N, C)"""

    def __init__(self, layer: int, causal: bool, fused: bool) -> None:
        super().__init__()
        self.layer, self.causal, self.fused = layer, causal, fused
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD, bias=False)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * HEAD)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * HEAD)
        self.o_proj = nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.at(name, proj(x).unflatten(-1, (-1, HEAD)).transpose(1, 2), x=x)
            for name, proj in (("q", self.q_proj), ("k", self.k_proj), ("v", self.v_proj))
        )
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        heads = self.at("heads", self.mix(q, k, v), x=x, v=v)
        return self.at("out", self.o_proj(heads.transpose(1, 2).flatten(2)), x=x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k) v, (B, H, N, D)"""
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        scores = q @ k.mT * HEAD**-0.5
        if self.causal:
            keep = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
            scores = scores.masked_fill(~keep, float("-inf"))
        return scores.softmax(-1) @ v


class Mlp(Place):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.up, self.act, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.at("hidden", self.act(self.up(x)), x=x)
        return self.at("mlp", self.down(hidden))


class Block(Place):
    steps = 2

    def __init__(self, layer: int, causal: bool, fused: bool) -> None:
        super().__init__()
        self.layer = layer
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(layer, causal, fused), Mlp(layer)

    def forward(self, x: Tensor) -> Tensor:
        for number, step in enumerate((self.attend, self.feed)):
            branch = self.at("branch", step(x), number, skip=x)
            joined = self.at("skip", x, number) + branch
            x = self.at("join", joined, number, skip=x, branch=branch)
        return x

    def attend(self, x: Tensor) -> Tensor:
        """The first branch."""
        return self.attn(self.norm1(x))

    def feed(self, x: Tensor) -> Tensor:
        """The second branch."""
        return self.mlp(self.norm2(x))


class Tiny(Place):
    """x: (B, N, 16) -> (B, N, 16). The timestep (B,) is added to the input; ``image`` (B, N) marks tokens."""

    def __init__(self, layers: int = 2, causal: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i, causal, fused) for i in range(layers))

    def forward(self, x: Tensor, timestep: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        if timestep is not None:
            x = x + torch.sin(timestep)[:, None, None]
        if image is not None:
            x = x + 0.1 * image.to(x.dtype).unsqueeze(-1)
        for layer, block in enumerate(self.blocks):
            x = self.at("after", block(self.at("before", x, layer)), layer, given=x)
        return x


def tiny(**options: Any) -> Tiny:
    """A Tiny in eval mode whose weights matter."""
    torch.manual_seed(0)
    model = Tiny(**options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.3) + (0 if p.dim() > 1 else 0.5))
    return model


def reference(model: Tiny, at: At) -> Tiny:
    """The same model with the gates written in Python."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, Place):
            module.gated_by = at
    return other
