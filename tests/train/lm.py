"""A causal language model of a few thousand parameters, in plain Python, and random token batches for it."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, LENGTH = 24, 16, 2, 12


class Attention(nn.Module):
    """Causal attention, x: (B, N, C)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.drop(self.o_proj(heads.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention(dropout)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LM(nn.Module):
    """ids (B, N) -> logits (B, N, V)."""

    def __init__(self, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def pair(dropout: float = 0.0) -> tuple[LM, LM]:
    """A student and its teacher: equal but for the student's attention, whose weights are others."""
    torch.manual_seed(0)
    teacher = LM().eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if p.dim() > 1:
                p.mul_(2)
            student.get_parameter(name).copy_(torch.randn_like(p) * 0.3 if ".attn." in name else p)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return student, teacher


def batches(count: int = 6, size: int = 4) -> list[Tensor]:
    """Random ids."""
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (size, LENGTH), generator=g) for _ in range(count)]
