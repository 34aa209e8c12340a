"""The frame around the handwritten attentions: embedding, two pre-norm blocks, head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.zoo.spec import VOCAB, Case, Inputs, Spec, padding, tokens

D, HEADS, WIDTH = 64, 4, 16
LONGEST = 64


class Attention(nn.Module):
    """q, k, v and output projections around `mix`, which a spelling writes."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(D, D)
        self.k = nn.Linear(D, self.kv_heads * WIDTH)
        self.v = nn.Linear(D, self.kv_heads * WIDTH)
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, N, D), mask: (B, N) -> (B, N, D)"""
        return self.out(merge(self.mix(split(self.q(x)), split(self.k(x)), split(self.v(x)), mask)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q: (B, H, N, E), k, v: (B, Hkv, N, E), mask: (B, N) -> (B, H, N, E)"""
        raise NotImplementedError


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(D)
        self.attention = attention
        self.norm2 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """ids: (B, N), mask: (B, N) or None -> (B, N, VOCAB)"""

    def __init__(self, attention: Callable[[], nn.Module], *, shared: bool = False) -> None:
        super().__init__()
        blocks = [Block(attention())] * 2 if shared else [Block(attention()), Block(attention())]
        self.embed = nn.Embedding(VOCAB, D)
        self.position = nn.Embedding(LONGEST, D)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, VOCAB)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def split(x: Tensor) -> Tensor:
    """(B, N, H*E) -> (B, H, N, E)"""
    return x.unflatten(-1, (-1, WIDTH)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """(B, H, N, E) -> (B, N, H*E)"""
    return x.transpose(1, 2).flatten(2)


def later(queries: int, keys: int) -> Tensor:
    """True where the key comes after the query. -> (N, M) bool"""
    return torch.ones(queries, keys, dtype=torch.bool).triu(1)


def plain_case(model: nn.Module, *, causal: bool) -> Case:
    """Token ids only."""
    return Case(model, lambda batch, length: Inputs((tokens(batch, length),), {}), causal=causal)


def padded_case(model: nn.Module, *, causal: bool) -> Case:
    """Token ids and a padding mask."""

    def make(batch: int, length: int) -> Inputs:
        return Inputs((tokens(batch, length),), {"mask": padding(batch, length)})

    return Case(model, make, causal=causal)


def packed_case(model: nn.Module, *, causal: bool) -> Case:
    """Token ids and the number of the text that each belongs to."""

    def make(batch: int, length: int) -> Inputs:
        starts = 3 + torch.arange(batch)[:, None]
        return Inputs((tokens(batch, length),), {"mask": torch.arange(length)[None] // starts})

    return Case(model, make, causal=causal)


def tower(
    name: str,
    attention: Callable[[], nn.Module],
    mask: str = "bidirectional",
    *,
    cores: int = 2,
    others: int = 0,
    causal: bool | None = None,
    case: Callable[..., Case] = plain_case,
    shared: bool = False,
    notes: str = "",
) -> Spec:
    """A tower of two blocks with this attention in them."""
    is_causal = mask.startswith(("causal", "sliding")) if causal is None else causal

    def build() -> Case:
        return case(Tower(attention, shared=shared), causal=is_causal)

    doc = notes or (attention.__doc__ or "").strip().partition("\n")[0]
    return Spec(name, "hand", "", build, cores, others, mask, doc)
