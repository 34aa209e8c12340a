"""Streams: small models with branches, streams and inputs to fuse, that recipes are checked on. Plain torch.

Weights are random and the same each time, as in `gatecc.recipes.samples`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatecc.recipes.samples import Block, FeedForward, SelfAttention, weighted

_WIDTH, _OTHER = 16, 12
Inputs = tuple[Tensor, ...]


class _ParallelBlock(nn.Module):
    """Attention and MLP beside each other, as in GPT-J."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(_WIDTH), SelfAttention(causal=True), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + (self.attn(y) + self.mlp(y))


class _Language(nn.Module):
    """ids: (B, N) -> (B, N, 32)"""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, _WIDTH), nn.Linear(_WIDTH, 32)
        self.blocks = nn.ModuleList(_ParallelBlock() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class _Graph(nn.Module):
    """x: (B, N, 16), adjacency: (N, N), which the model itself does not read -> (B, N, 16)"""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(causal=False) for _ in range(2))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Layer(nn.Module):
    """One residual layer without attention. x: (B, N, C)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class _Two(nn.Module):
    """sequence: (B, N, 16), structure: (B, N, 12) -> (B, N, 28), one beside the other; neither reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence = nn.ModuleList(_Layer(_WIDTH) for _ in range(2))
        self.structure = nn.ModuleList(_Layer(_OTHER) for _ in range(2))

    def forward(self, sequence: Tensor, structure: Tensor) -> Tensor:
        for block in self.sequence:
            sequence = block(sequence)
        for block in self.structure:
            structure = block(structure)
        return torch.cat([sequence, structure], -1)


class _Classifier(nn.Module):
    """x: (B, N, 16) -> (B, 6), from the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(causal=False) for _ in range(2)), nn.Linear(_WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class _Ordered(nn.Module):
    """Residual layers whose mixer has an order: a GRU. x: (B, N, 16) -> (B, N, 16)"""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(_WIDTH) for _ in range(2))
        self.mixers = nn.ModuleList(nn.GRU(_WIDTH, _WIDTH, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))[0]
        return x


class _Motion(nn.Module):
    """Tokens that are denoised behind those of two conditions. x: (B, N, 16), t: (B,), text: (B, M, 12), coarse: (B, K,
    16) -> (B, N, 16)"""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.coarse, self.time = nn.Linear(_OTHER, _WIDTH), nn.Linear(_WIDTH, _WIDTH), nn.Linear(1, _WIDTH)
        self.inward = nn.Linear(_WIDTH, _WIDTH)
        self.blocks = nn.ModuleList(Block(causal=False) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, coarse: Tensor) -> Tensor:
        time = self.time(t.to(x.dtype).unsqueeze(-1) / 1000).unsqueeze(1)
        y = torch.cat([self.text(text), self.coarse(coarse), self.inward(x) + time], 1)
        for block in self.blocks:
            y = block(y)
        return y[:, -x.size(1) :]


class _Routing(nn.Module):
    """points: (B, N, 2), distance: (B, N, N), which the model itself does not read -> (B, N, 16)"""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Linear(2, _WIDTH), Block(causal=False)

    def forward(self, points: Tensor, distance: Tensor) -> Tensor:
        return self.block(self.embed(points))


class _Forecasts(nn.Module):
    """Patches (B, 3 series, 4, 16) -> forecasts (B, 5, 3), each series by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Mixing() for _ in range(2))
        self.head = nn.Linear(4 * _WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(2)).mT


class _Mixing(nn.Module):
    """x: (B, S, P, 16)"""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(_WIDTH), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class _Denoiser(nn.Module):
    """x: (B, 3, Y, X), timestep: (B,) -> (B, 3, Y, X)"""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.out = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.inward(x) + torch.sin(timestep)[:, None, None, None]
        for layer in self.layers:
            x = x + layer(torch.relu(x))
        return self.out(x)


class _Mean(nn.Module):
    """The mean of two denoisers."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList(_Denoiser() for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return (self.models[0](x, timestep) + self.models[1](x, timestep)) / 2


def parallel() -> tuple[nn.Module, Inputs]:
    """A causal language model whose attention and MLP stand beside each other."""
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(3))
    return weighted(_Language()), (ids,)


def nodes() -> tuple[nn.Module, Inputs]:
    """An encoder of the nodes of a graph, which is given as one more input."""
    edges = torch.rand(6, 6, generator=torch.Generator().manual_seed(3))
    return weighted(_Graph()), (_noise(2, 6, _WIDTH), edges * (edges > 0.5))


def two() -> tuple[nn.Module, Inputs]:
    """Two encoders of the same tokens, of different widths, that do not read each other."""
    return weighted(_Two()), (_noise(2, 6, _WIDTH), _noise(2, 6, _OTHER))


def classifier() -> tuple[nn.Module, Inputs]:
    """An encoder with a head of 6 outputs on the mean of its tokens."""
    return weighted(_Classifier()), (_noise(3, 6, _WIDTH),)


def ordered() -> tuple[nn.Module, Inputs]:
    """An encoder whose mixers read tokens in their order."""
    return weighted(_Ordered()), (_noise(2, 7, _WIDTH),)


def routing() -> tuple[nn.Module, Inputs]:
    """An encoder of points, and the distances between them."""
    return weighted(_Routing()), (points := _noise(2, 6, 2), torch.cdist(points, points) * 1.5)


def forecasts() -> tuple[nn.Module, Inputs]:
    """A forecaster of three series that do not read each other."""
    return weighted(_Forecasts()), (_noise(2, 3, 4, _WIDTH),)


def denoisers() -> tuple[nn.Module, Inputs]:
    """Two denoisers of one architecture, whose outputs are averaged."""
    return weighted(_Mean()), (_noise(2, 3, 5, 5), torch.tensor([0.2, 3.0]))


def motion() -> tuple[nn.Module, Inputs]:
    """A denoiser that reads the tokens of a text and of a coarse motion before its own."""
    return weighted(_Motion()), (
        _noise(2, 5, _WIDTH),
        torch.tensor([10, 500]),
        _noise(2, 3, _OTHER),
        _noise(2, 4, _WIDTH),
    )


def _noise(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(2))
