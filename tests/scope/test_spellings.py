"""One site in two spellings: attention that also returns its weights is another graph, and the same gate."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from tests.copies import learning_alone


class Net(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor, weights: bool = False, average: bool = True) -> tuple[Tensor, Tensor | None]:
        y, seen = self.attention(x, x, x, need_weights=weights, average_attn_weights=average)
        return self.out(y), seen


@cache
def transformed(batch_first: bool, first: tuple[bool, ...], sizes: tuple[int, ...]) -> nn.Module:
    return gatecc.transform(Net(batch_first).eval(), "gated-attention", (torch.randn(*sizes, 16), *first))


@pytest.mark.broad(2)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("first", "second"), [((), (True,)), ((True,), ()), ((), (True, False))])
@pytest.mark.parametrize("sizes", [(2, 6), (1, 6), (6,)])
def test_the_same_gate_in_both_spellings(
    batch_first: bool, first: tuple[bool, ...], second: tuple[bool, ...], sizes: tuple[int, ...]
) -> None:
    model: Any = Net(batch_first).eval()
    gated: Any = learning_alone(transformed(batch_first, first, sizes))
    x = torch.randn(3, 5, 16)
    assert torch.allclose(gated(x, *second)[0], model(x)[0], atol=1e-6)
    with torch.no_grad():
        gated.attention.gate.weight.normal_()
    expected = gated(x, *first)[0]
    assert not torch.allclose(expected, model(x)[0], atol=1e-3)
    assert torch.allclose(gated(x, *second)[0], expected, atol=1e-5)
    assert gated(x, True, False)[1].shape == (*((3, 4, 5, 5) if batch_first else (5, 4, 3, 3)),)
