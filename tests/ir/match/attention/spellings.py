"""Spellings of softmax attention: how scores are multiplied, scaled, masked, made weights, and how heads are shared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

HEADS, WIDTH, D = 4, 3, 12

Scores = Callable[[Tensor, Tensor], Tensor]

PRODUCTS: dict[str, Scores] = {
    "matmul": lambda q, k: q @ k.mT,
    "transpose": lambda q, k: torch.matmul(q, k.transpose(-2, -1)),
    "einsum": lambda q, k: torch.einsum("bhne,bhme->bhnm", q, k),
    "ellipsis": lambda q, k: torch.einsum("...ne,...me->...nm", q, k),
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (-1, q.shape[1])),
    "baddbmm": lambda q, k: (
        torch.baddbmm(torch.zeros(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.0, alpha=2.0).unflatten(
            0, (-1, q.shape[1])
        )
        / 2.0
    ),
}
SCALES: dict[str, Callable[[Scores, Tensor, Tensor], Tensor]] = {
    "none": lambda product, q, k: product(q, k),
    "query": lambda product, q, k: product(q * 0.5, k),
    "both": lambda product, q, k: product(q / math.sqrt(2.0), k / math.sqrt(2.0)),
    "scores": lambda product, q, k: product(q, k) * 0.5,
    "divided": lambda product, q, k: product(q, k) / 2.0,
    "tensor": lambda product, q, k: product(q, k) / torch.sqrt(torch.tensor(4.0)),
}
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda s: s.softmax(-1),
    "cast": lambda s: F.softmax(s, dim=3, dtype=torch.float32).to(s.dtype),
    "exp": lambda s: s.exp() / s.exp().sum(-1, keepdim=True),
    "shifted": lambda s: _normalised((s - s.amax(-1, keepdim=True)).exp()),
    "reciprocal": lambda s: _inverse((s - s.max(-1, keepdim=True).values).exp()),
    "logsumexp": lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "log_softmax": lambda s: s.log_softmax(-1).exp(),
}
VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda w, v: w @ v,
    "einsum": lambda w, v: torch.einsum("bhnm,bhme->bhne", w, v),
    "bmm": lambda w, v: torch.bmm(w.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, w.shape[1])),
    "swapped": lambda w, v: (v.mT @ w.mT).mT,
    "dropped": lambda w, v: F.dropout(w, 0.1, training=False) @ v,
}
GROUPS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "expand": lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2),
    "repeat": lambda x: x.repeat_interleave(2, dim=1),
}


def _normalised(powers: Tensor) -> Tensor:
    return powers / powers.sum(-1, keepdim=True)


def _inverse(powers: Tensor) -> Tensor:
    return powers * powers.sum(dim=-1, keepdim=True).reciprocal()


def _later(n: int, m: int) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool).triu(1)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda s: s,
    "masked_fill": lambda s: s.masked_fill(_later(s.shape[-2], s.shape[-1]), -torch.inf),
    "in_place": lambda s: s.masked_fill_(_later(s.shape[-2], s.shape[-1]), -1e9),
    "where": lambda s: torch.where(_later(s.shape[-2], s.shape[-1]), torch.finfo(s.dtype).min, s),
    "additive": lambda s: s + torch.full((s.shape[-2], s.shape[-1]), -torch.inf).triu(1),
    "ten_thousand": lambda s: s - 1e4 * _later(s.shape[-2], s.shape[-1]).float(),
    "window": lambda s: s.masked_fill(_outside(s.shape[-2], s.shape[-1], 3), -torch.inf),
}


def _outside(n: int, m: int, width: int) -> Tensor:
    distance = torch.arange(n)[:, None] - torch.arange(m)
    return (distance < 0) | (distance >= width)


@dataclass(frozen=True)
class Spelling:
    product: str
    scale: str
    mask: str
    softmax: str
    values: str
    group: str
    fused: bool  # q, k and v in one Linear

    @property
    def kind(self) -> str:
        return {"none": "bidirectional", "window": "sliding_window"}.get(self.mask, "causal")


SPELLINGS = st.builds(
    Spelling,
    product=st.sampled_from(sorted(PRODUCTS)),
    scale=st.sampled_from(sorted(SCALES)),
    mask=st.sampled_from(sorted(MASKS)),
    softmax=st.sampled_from(sorted(SOFTMAXES)),
    values=st.sampled_from(sorted(VALUES)),
    group=st.sampled_from(sorted(GROUPS)),
    fused=st.booleans(),
)


class Spelled(nn.Module):
    """x: (B, N, D) -> (B, N, D)"""

    def __init__(self, how: Spelling) -> None:
        super().__init__()
        self.how = how
        self.kv_heads = HEADS if how.group == "none" else HEADS // 2
        self.rows = [HEADS * WIDTH, self.kv_heads * WIDTH, self.kv_heads * WIDTH]
        self.projections = nn.ModuleList(
            [nn.Linear(D, sum(self.rows))] if how.fused else [nn.Linear(D, r) for r in self.rows]
        )
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        pieces = [p(x) for p in self.projections]
        pieces = pieces[0].split(self.rows, dim=-1) if self.how.fused else pieces
        q, k, v = (t.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for t in pieces)
        k, v = GROUPS[self.how.group](k), GROUPS[self.how.group](v)
        scores = MASKS[self.how.mask](SCALES[self.how.scale](PRODUCTS[self.how.product], q, k))
        heads = VALUES[self.how.values](SOFTMAXES[self.how.softmax](scores), v)
        return self.out(heads.transpose(1, 2).flatten(2))
