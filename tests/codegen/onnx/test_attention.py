"""Scaled dot product attention of every kind: one ONNX node, or spelled out, and always torch's numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc

pytest.importorskip("onnxruntime")
attend = F.scaled_dot_product_attention
Kind = Callable[[Tensor, Tensor, Tensor], Tensor]


def seen(q: Tensor, k: Tensor) -> Tensor:
    """(L, S), True where a query sees a key: queries see the keys of every second place, the third query none."""
    places = torch.arange(k.size(-2))
    return (places % 2 == 0).expand(q.size(-2), -1) & (torch.arange(q.size(-2)) != 2)[:, None]


def lowest(q: Tensor, k: Tensor) -> Tensor:
    """(L, S), the lowest finite number where a query sees nothing: torch spreads its attention evenly."""
    return torch.zeros(q.size(-2), k.size(-2)).masked_fill(~seen(q, k), torch.finfo(torch.float32).min)


KINDS: dict[str, Kind] = {
    "plain": attend,
    "causal, more keys": lambda q, k, v: attend(q, k, v, is_causal=True),
    "causal, more queries": lambda q, k, v: attend(k, q, q, is_causal=True),
    "a mask": lambda q, k, v: attend(q, k, v, seen(q, k)),
    "minus infinity": lambda q, k, v: attend(q, k, v, torch.zeros(()).where(seen(q, k), -torch.inf)),
    "the lowest number": lambda q, k, v: attend(q, k, v, lowest(q, k)),
    "one row of a mask": lambda q, k, v: attend(q, k, v, seen(q, k)[:1]),
    "a negative scale": lambda q, k, v: attend(q, k, v, scale=-0.3),
    "three axes": lambda q, k, v: attend(q[:, 0], k[:, 0], v[:, 0], seen(q, k)),
    "five axes": lambda q, k, v: attend(q[:, None], k[:, None], v[:, None], seen(q, k)),
    "shared heads": lambda q, k, v: attend(q, k[:, :2], v[:, :2], enable_gqa=True),
    "one key head": lambda q, k, v: attend(q, k[:, :1], v[:, :1]),
    "one batch of keys": lambda q, k, v: attend(q, k[:1], v[:1]),
    "one query": lambda q, k, v: attend(q[:, :, :1], k, v, seen(q, k)[:1]),
}
NODES = {24: 9, 18: 0}


class All(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        """x: (B, N, 96)"""
        q, k = x[..., :32].unflatten(-1, (4, 8)).transpose(1, 2), x[..., 32:64].unflatten(-1, (4, 8)).transpose(1, 2)
        return [kind(q[:, :, :-2], k, x[..., 64:].unflatten(-1, (4, 8)).transpose(1, 2)) for kind in KINDS.values()]


@pytest.mark.parametrize("opset", NODES)
def test_every_kind_of_attention(opset: int, tmp_path: Path) -> None:
    made = gatecc.export(All(), tmp_path / "x", (torch.randn(2, 7, 96),), opset=opset)
    nodes = [made.operators.get(op, 0) for op in ("Attention", "com.microsoft::MultiHeadAttention")]
    assert sum(nodes) == NODES[opset]
    assert max(c.error for c in made.compared) < 2e-6
    assert [(c.sizes["batch"], c.sizes["sequence"]) for c in made.compared] == [
        (1, 7),
        (3, 7),
        (1, 10),
        (3, 10),
        (1, 131),
    ]
    assert made.notes == ()
