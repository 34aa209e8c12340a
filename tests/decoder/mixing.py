"""Small causal models that mix tokens in one way each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatecc.ops.linear_attention import linear_attention

V, D, H = 31, 16, 2


class Mixed(nn.Module):
    """Embedding, a residual block around ``mixer``, a head."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.embed, self.mixer, self.head = nn.Embedding(V, D), mixer, nn.Linear(D, V)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, N) -> (B, N, V)"""
        x = self.embed(ids)
        return self.head(x + self.mixer(x))


class Convolution(nn.Module):
    """A depthwise causal convolution: padded on both sides and cut, or padded on the left."""

    def __init__(self, *, cut: bool, dilation: int = 1) -> None:
        super().__init__()
        self.cut, self.pad = cut, 3 * dilation
        self.conv = nn.Conv1d(D, D, 4, padding=self.pad if cut else 0, dilation=dilation, groups=D)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        x = x.transpose(1, 2)
        x = self.conv(x)[..., : x.shape[-1]] if self.cut else self.conv(F.pad(x, (self.pad, 0)))
        return F.silu(x).transpose(1, 2)


class Centred(nn.Module):
    """A convolution that looks ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class RunningMean(nn.Module):
    """The mean of all tokens so far."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1).unsqueeze(1)


class RunningMaximum(nn.Module):
    """A smooth maximum of all tokens so far."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        return torch.logcumsumexp(x, 1)


class WholeMean(nn.Module):
    """The mean of all tokens: each sees those after it."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        return x.mean(1, keepdim=True).expand_as(x)


class Reversed(nn.Module):
    """A total from the end."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        return x.flip(1).cumsum(1).flip(1)


class LinearAttention(nn.Module):
    """Linear attention: gated, delta rule, normalised, or reversed."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.qkv, self.gate, self.beta, self.out = (
            nn.Linear(D, 3 * D),
            nn.Linear(D, D),
            nn.Linear(D, H),
            nn.Linear(D, D),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.rule == "normalised":
            q, k = F.elu(q) + 1, F.elu(k) + 1
        decay = F.logsigmoid(self.gate(x)).unflatten(-1, (H, -1)).transpose(1, 2) if "gated" in self.rule else None
        beta = self.beta(x).sigmoid().transpose(1, 2) if "delta" in self.rule else None
        k = F.normalize(k, dim=-1) if "delta" in self.rule else k
        normalize, backwards = self.rule == "normalised", self.rule == "reversed"
        o, _ = linear_attention(q, k, v, decay, beta, normalize=normalize, reverse=backwards)
        return self.out(o.transpose(1, 2).flatten(2))
