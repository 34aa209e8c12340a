"""Merge sites: joins that are no residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.ir.match.found import Lambda, find

F1, F2 = nn.Linear(6, 6), nn.Linear(6, 6)


def test_two_towers() -> None:
    found = find(Lambda(lambda m, x, y: m.f(x) + m.g(y), f=F1, g=F2), torch.randn(2, 5, 6), torch.randn(2, 5, 6))
    (site,) = found.sites("merge")
    assert site.form == "add"
    torch.testing.assert_close(found.value(site, "in0") + found.value(site, "in1"), found.value(site, "out"))


def test_concatenation_of_three() -> None:
    found = find(Lambda(lambda m, x: torch.cat([m.f(x), m.g(x), x], -1), f=F1, g=F2), torch.randn(2, 5, 6))
    (site,) = found.sites("merge")
    assert site.form == "cat"
    assert list(site.values) == ["in0", "in1", "in2", "out"]
    torch.testing.assert_close(torch.cat([found.value(site, f"in{i}") for i in range(3)], -1), found.value(site, "out"))


class UNet(nn.Module):
    """One level down and up, the skip by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down, self.mid = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 8, 2, 2), nn.Conv2d(8, 8, 3, 1, 1)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.inc(x).relu()
        return self.out(torch.cat([first, self.up(self.mid(self.down(first)).relu())], 1))


def test_unet_skip() -> None:
    found = find(UNet(), torch.randn(2, 3, 8, 8))
    (site,) = found.sites("merge")
    assert (site.form, found.axes(site)) == ("cat", {"in0": "bcyx", "in1": "bcyx", "out": "bcyx"})


def test_parts_of_one_map_are_no_merge() -> None:
    """Swin's patch merging."""

    def merging(m: Any, x: Tensor) -> Tensor:
        x = m.f(x)
        return torch.cat([x[:, 0::2], x[:, 1::2]], -1)

    found = find(Lambda(merging, f=F1), torch.randn(2, 6, 6))
    assert not found.sites("merge")
    assert not found.refusals("merge")


def test_positions_and_learned_tokens_are_refused() -> None:
    def embed(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.token.expand(x.shape[0], -1, -1), m.f(x) + m.position], 1)

    parts = dict(f=F1, position=nn.Parameter(torch.randn(1, 5, 6)), token=nn.Parameter(torch.randn(1, 1, 6)))
    found = find(Lambda(embed, **parts), torch.randn(2, 5, 6))
    assert not found.sites("merge")
    assert found.codes("merge") == ["GCC150"] * 2


def test_a_mask_without_weights_is_refused() -> None:
    found = find(
        Lambda(lambda m, x, mask: m.f(x) + (1 - mask[..., None]) * -1e4 * torch.ones(6), f=F1),
        torch.randn(2, 5, 6),
        torch.ones(2, 5),
    )
    assert found.codes("merge") == ["GCC152"]


def test_sums_of_scores_are_refused_and_masks_on_them_are_nothing() -> None:
    def attention(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        q, k, p = m.f(x), m.g(x), m.p(x)
        scores = q @ k.mT + q @ p.mT
        return (scores + mask).softmax(-1) @ x

    found = find(Lambda(attention, f=F1, g=F2, p=nn.Linear(6, 6)), torch.randn(2, 5, 6), torch.zeros(2, 5, 5))
    assert found.codes("merge") == ["GCC151"]
    assert not found.sites("merge")
