"""Attention in unusual places, and calls of scaled_dot_product_attention in every form that it has."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.spec import VOCAB, Case, Inputs, Spec, noise, tokens
from tests.zoo.tower import HEADS, WIDTH, Attention, Block, D, later, merge, packed_case, padded_case, split, tower


class Sdpa(Attention):
    """No mask, the scale by default."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class SdpaCausal(Attention):
    """is_causal and a dropout that is live in training only."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)


class SdpaGrouped(Attention):
    """enable_gqa with half the key-value heads, and a scale."""

    kv_heads = 2

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True)


class SdpaBoolean(Attention):
    """A boolean mask that proves to be causal."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~later(q.shape[2], k.shape[2]))


class SdpaSliding(Attention):
    """A boolean mask of a sliding window."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(column <= row) & (column > row - 8))


class SdpaBias(Attention):
    """An additive float mask that carries a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.zeros(HEADS))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        place = torch.arange(q.shape[2])
        bias = -(place - place[:, None]).abs() * self.slopes.exp()[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


class SdpaPadded(Attention):
    """A padding mask, which may be None."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen = None if mask is None else mask[:, None, None].bool()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class SdpaPacked(Attention):
    """Several texts in one row, each seen by itself only."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        seen = (mask[:, None, :, None] == mask[:, None, None]) & ~later(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class SoftmaxModule(Attention):
    """Softmax and dropout are child modules: the owner is their parent."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)
        self.drop = nn.Dropout(0.1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.drop(self.softmax(q @ k.mT * WIDTH**-0.5)) @ v


class Scores(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


class WeightsModule(Attention):
    """A child computes the weights, the parent uses them: the owner is the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = Scores()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.weights(q, k) @ v


class Head(nn.Module):
    """One causal head with its own projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, N, E)"""
        scores = self.q(x) @ self.k(x).mT * WIDTH**-0.5
        return scores.masked_fill(later(*scores.shape[-2:]), float("-inf")).softmax(-1) @ self.v(x)


class HeadList(nn.Module):
    """A list of heads, concatenated: each head is an owner."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head() for _ in range(HEADS)])
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(torch.cat([head(x) for head in self.heads], dim=-1))


class HeadLoop(Attention):
    """A Python loop over the heads: one owner, four cores."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        heads = [(q[:, i] @ k[:, i].mT * WIDTH**-0.5).softmax(-1) @ v[:, i] for i in range(HEADS)]
        return torch.stack(heads, dim=1)


class TwoInOne(Attention):
    """Two attentions in one owner: over all tokens, and causal over the first one's output."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        first = (q @ k.mT * WIDTH**-0.5).softmax(-1) @ v
        scores = (first @ k.mT * WIDTH**-0.5).masked_fill(later(q.shape[2], k.shape[2]), float("-inf"))
        return scores.softmax(-1) @ v


class GatedOutput(Attention):
    """A sigmoid gate on the heads stands there already."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        heads = (q @ k.mT * WIDTH**-0.5).softmax(-1) @ v
        return self.out(merge(heads) * torch.sigmoid(self.gate(x)))


class CrossAttention(Attention):
    """Queries from one sequence, keys and values from another of another length."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        q, k, v = split(self.q(x)), split(self.k(mask)), split(self.v(mask))
        return self.out(merge((q @ k.mT * WIDTH**-0.5).softmax(-1) @ v))


class LatentQueries(Attention):
    """Perceiver: learned latents, projected, ask the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, 5, D))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = split(self.q(self.latents.expand(x.shape[0], -1, -1)))
        heads = (q @ split(self.k(x)).mT * WIDTH**-0.5).softmax(-1) @ split(self.v(x))
        return self.out(merge(heads)).mean(1, keepdim=True)


class Translator(nn.Module):
    """A decoder block whose cross-attention reads a memory. ids: (B, N), memory: (B, M, D) -> (B, N, VOCAB)"""

    def __init__(self, own: Callable[[], nn.Module], cross: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.own, self.cross = Block(own()), Block(cross())
        self.head = nn.Linear(D, VOCAB)

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.cross(self.own(self.embed(ids)), memory))


def _translator() -> Case:
    def make(batch: int, length: int) -> Inputs:
        return Inputs((tokens(batch, length), noise(batch, length + 5, D)), {})

    return Case(Translator(SdpaCausal, CrossAttention), make, causal=True)


def specs() -> list[Spec]:
    return [
        tower("sdpa", Sdpa),
        tower("sdpa_causal", SdpaCausal, "causal"),
        tower("sdpa_gqa", SdpaGrouped, "causal"),
        tower("sdpa_boolean", SdpaBoolean, "causal"),
        tower("sdpa_sliding", SdpaSliding, "sliding:8"),
        tower("sdpa_bias", SdpaBias),
        tower("sdpa_padded", SdpaPadded, "varied", case=padded_case),
        tower("sdpa_padded_none", SdpaPadded),
        tower("sdpa_packed", SdpaPacked, "varied", causal=True, case=packed_case),
        tower("softmax_module", SoftmaxModule),
        tower("weights_module", WeightsModule),
        tower("head_list", HeadList, "causal", cores=2 * HEADS),
        tower("head_loop", HeadLoop, cores=2 * HEADS),
        tower("two_in_one", TwoInOne, "bidirectional,causal,bidirectional,causal", cores=4, causal=False),
        tower("gated_output", GatedOutput),
        tower("latent_queries", LatentQueries),
        tower("shared_block", SdpaCausal, "causal", shared=True, notes="one block, called twice"),
        Spec("cross_attention", "hand", "", _translator, 2, 0, "causal,bidirectional", CrossAttention.__doc__ or ""),
    ]
