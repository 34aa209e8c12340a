"""Multi-head latent attention is self-attention on the stream, and channels are told from tokens of the same number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.ir.site import Attention
from tests.graphs import record
from tests.ir.match.attention_math import check
from tests.ir.match.found import Found, Lambda, find

B, N, C, H, D, RANK, TURNED = 2, 5, 12, 3, 4, 6, 2
X = torch.randn(B, N, C)


def only(module: nn.Module, *inputs: Tensor) -> tuple[Found, Attention]:
    found = find(module, *inputs)
    (site,) = found.sites("attention")
    return found, site


class Latent(nn.Module):
    """As in DeepSeek V3: keys and values share a latent value, beside which a part of the keys is made directly."""

    def __init__(self, low_rank_queries: bool = True, down: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        wide = H * (D + TURNED)
        self.q_a = nn.Sequential(nn.Linear(C, RANK), down(), nn.RMSNorm(RANK)) if low_rank_queries else nn.Identity()
        self.q_b = nn.Linear(RANK if low_rank_queries else C, wide)
        self.kv_a = nn.Linear(C, RANK + TURNED)
        self.norm = nn.RMSNorm(RANK)
        self.kv_b = nn.Linear(RANK, H * 2 * D)
        self.o = nn.Linear(H * D, C)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q = self.q_b(self.q_a(x)).unflatten(-1, (H, -1)).transpose(1, 2)
        latent, turned = self.kv_a(x if other is None else other).split([RANK, TURNED], -1)
        k, v = self.kv_b(self.norm(latent)).unflatten(-1, (H, -1)).transpose(1, 2).split([D, D], -1)
        k = torch.cat([k, turned[:, None].expand(-1, H, -1, -1)], -1)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("low_rank_queries", [True, False])
def test_latent_attention_reads_the_stream(low_rank_queries: bool) -> None:
    found, site = only(Latent(low_rank_queries), X)
    assert not site.cross
    assert torch.equal(found.value(site, "hidden"), X)
    assert "hidden_kv" not in site.values
    assert set(site.weights) == ({"o"} if low_rank_queries else {"q", "o"})  # two matrices make the others
    assert check(site, record(found.program))


def test_latent_values_of_another_sequence_are_cross_attention() -> None:
    found, site = only(Latent(), X, torch.randn(B, N + 2, C))
    assert site.cross
    assert found.value(site, "hidden_kv").shape[1] == N + 2


def test_a_nonlinearity_between_makes_it_something_else() -> None:
    found, site = only(Latent(down=nn.GELU), X)
    assert found.value(site, "hidden").shape[-1] == RANK


def channels(m: Any, x: Tensor) -> Tensor:
    """XCiT: what is contracted are tokens."""
    q, k, v = m.qkv(x + m.places).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 4, 1).unbind(0)
    weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 0.5).softmax(-1)
    return m.o((weights @ v).permute(0, 3, 1, 2).flatten(2))


def transposed(m: Any, x: Tensor) -> Tensor:
    """DaViT: queries and keys are laid out as for tokens, and turned in the product."""
    q, k, v = m.qkv(x + m.places).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((q * 0.5).mT @ k).softmax(-1)
    return m.o((weights @ v.mT).mT.transpose(1, 2).flatten(2))


def tokens(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x + m.places).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return m.o(((q @ k.mT * 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("count", [D, D + 1])
@pytest.mark.parametrize(("form", "over"), [(channels, "channels"), (transposed, "channels"), (tokens, "tokens")])
def test_channels_are_told_where_there_are_as_many_tokens(form: Any, over: str, count: int) -> None:
    """The number of tokens is a constant of the model, that of the channels of a head or another."""
    parts = {"qkv": nn.Linear(C, 3 * C), "o": nn.Linear(C, C), "places": nn.Parameter(torch.randn(count, C))}
    found, site = only(Lambda(form, **parts), torch.randn(B, count, C))
    assert site.over == over
    assert str(site.values["scores"].axes) == ("bhdc" if over == "channels" else "bhnm")
    assert site.heads == H
    assert check(site, record(found.program))
