"""Embedding sites: where the stream starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ir.match.found import Lambda, find

IDS = torch.randint(0, 9, (2, 5))


def test_tokens_and_positions() -> None:
    def embed(m: Any, ids: Tensor) -> Tensor:
        return m.tokens(ids) + m.positions(torch.arange(ids.shape[1]))

    found = find(Lambda(embed, tokens=nn.Embedding(9, 6), positions=nn.Embedding(16, 6)), IDS)
    (site,) = found.sites("embedding")
    assert (site.owner, found.axes(site)) == ("tokens", {"in": "bn", "out": "bnc"})
    table = found.parameter(site.weights["weight"].fqn)
    torch.testing.assert_close(table[found.value(site, "in")].detach(), found.value(site, "out"))
    assert [(r.code, r.owner) for r in found.refusals("embedding")] == [("GCC160", "positions")]
    assert found.codes("merge") == ["GCC150"]


def test_two_look_ups_are_two_sites_and_a_merge() -> None:
    both = Lambda(
        lambda m, ids, kinds: m.tokens(ids) + m.kinds(kinds), tokens=nn.Embedding(9, 6), kinds=nn.Embedding(2, 6)
    )
    found = find(both, IDS, torch.randint(0, 2, (2, 5)))
    assert found.owners("embedding") == ["tokens", "kinds"]
    assert len(found.sites("merge")) == 1


def tokens(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x.flatten(2).transpose(1, 2), [6])


@pytest.mark.parametrize(
    ("conv", "patches"),
    [
        (nn.Conv2d(3, 6, 4, 4), True),  # ViT
        (nn.Conv2d(3, 6, 7, 4, 3), True),  # Segformer: windows overlap, the map becomes tokens
        (nn.Conv2d(3, 6, 3, 1, 1), False),  # a stem
    ],
)
def test_patches(conv: nn.Conv2d, patches: bool) -> None:
    found = find(
        Lambda(lambda m, x: m.out(tokens(m.proj(x))), proj=conv, out=nn.Linear(6, 6)), torch.randn(2, 3, 16, 16)
    )
    assert found.owners("embedding") == ["proj"] * patches


def test_a_strided_stem_is_no_patch_embedding() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 7, 2, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 2, 2))
    assert not find(net, torch.randn(2, 3, 16, 16)).sites("embedding")


def test_a_patch_convolution_inside_a_submodule_starts_no_stream() -> None:
    assert not find(nn.Sequential(nn.Conv2d(3, 6, 4, 4)), torch.randn(2, 3, 16, 16), fqn="stages.1").sites("embedding")
