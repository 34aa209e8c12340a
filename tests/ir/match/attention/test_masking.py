"""Masks and biases are values of attention sites, with axes: what meets the scores, told by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.site import Attention
from gatecc.passes.operands import stage
from tests.ir.match.found import Found, Lambda, find

B, H, N, D = 2, 3, 5, 4
SHAPE = (B, H, N, D)
LATER = torch.ones(N, N, dtype=torch.bool).triu(1)


def attention(function: Any, *inputs: Tensor, **parts: nn.Module | nn.Parameter) -> tuple[Found, Attention]:
    found = find(Lambda(function, **parts), *(torch.randn(SHAPE) for _ in range(3)), *inputs)
    (site,) = found.sites("attention")
    return found, site


def spelled(q: Tensor, k: Tensor, v: Tensor, *added: Tensor) -> Tensor:
    return (sum(added, q @ k.mT * 0.5)).softmax(-1) @ v


def named(site: Attention) -> dict[str, tuple[str, str]]:
    names = {value: name for name, value in site.values.items()}
    return {names[m]: (str(m.axes), m.how) for m in site.maskings}


def test_a_mask_that_is_handed_in() -> None:
    mask = torch.zeros(B, 1, N, N).masked_fill(LATER, -1e4)
    found, site = attention(lambda m, q, k, v, mask: spelled(q, k, v, mask), mask)
    assert named(site) == {"mask": ("bhnm", "added")}
    assert site.values["mask"].node.op == "placeholder"
    q, k = found.value(site, "q"), found.value(site, "k")
    torch.testing.assert_close(q @ k.mT * 0.5 + mask, found.value(site, "scores"))


def test_a_mask_and_a_learned_bias() -> None:
    mask, bias = torch.zeros(B, 1, 1, N), nn.Parameter(torch.randn(H, N, N))
    found, site = attention(lambda m, q, k, v, mask: spelled(q, k, v, m.bias, mask), mask, bias=bias)
    assert named(site) == {"bias": ("hnm", "added"), "mask": ("bhnm", "added")}
    assert torch.equal(found.value(site, "bias"), bias)
    assert [m.node for m in site.maskings] == [site.values["bias"].node, site.values["mask"].node]


def test_a_table_of_distances_is_a_bias_and_one_that_hides_is_a_mask() -> None:
    def alibi(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = torch.arange(q.shape[-2])
        slopes = torch.tensor([0.5, 0.25, 0.125])
        distances = slopes[:, None, None] * -(n[:, None] - n).abs().float()
        later = torch.full((len(n), len(n)), -torch.inf).triu(1)
        return spelled(q, k, v, distances, later)

    _, site = attention(alibi)
    assert named(site) == {"bias": ("hnm", "added"), "mask": ("nm", "added")}


def test_of_several_masks_the_last_is_the_mask() -> None:
    def twice(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.where(~LATER, q @ k.mT, -1e9) + mask
        return scores.softmax(-1) @ v

    _, site = attention(twice, torch.zeros(B, 1, 1, N))
    assert named(site) == {"mask0": ("nm", "seen"), "mask": ("bhnm", "added")}


def test_heads_that_are_merged_and_windows_that_are_apart() -> None:
    def windows(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (torch.stack([x, x + 1], 1).flatten(0, 1) for x in (q, k, v))
        scores = (q @ k.mT).view(len(q) // 2, 2, H, N, N) + mask[:, None]
        return scores.view(-1, H, N, N).softmax(-1) @ v

    mask = torch.zeros(2, N, N)
    mask[1, :, 0] = -100.0
    _, site = attention(windows, mask)
    assert named(site) == {"mask": ("whnm", "added")}

    def merged(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b, c = (m.p(x.transpose(1, 2).flatten(2)).unflatten(-1, (H, D)).transpose(1, 2) for x in (q, k, v))
        scores = torch.baddbmm(m.bias, a.flatten(0, 1), b.flatten(0, 1).mT)
        return (scores.softmax(-1) @ c.flatten(0, 1)).unflatten(0, (-1, H))

    _, site = attention(merged, p=nn.Linear(H * D, H * D), bias=nn.Parameter(torch.randn(1, N, N)))
    assert named(site) == {"bias": ("gnm", "added")}


@pytest.mark.parametrize("biased", [False, True])
def test_what_is_handed_to_the_fused_operator(biased: bool) -> None:
    def fused(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask + m.bias if biased else mask)

    bias = nn.Parameter(torch.randn(1, H, N, N))
    found, site = attention(fused, torch.zeros(B, 1, N, N), bias=bias)
    assert named(site) == {"mask": ("bhnm", "added")}
    assert ("bias" in site.values) == biased
    if biased:
        assert torch.equal(found.value(site, "bias"), bias)
        torch.testing.assert_close(found.value(site, "mask"), bias.expand(B, H, N, N))


def test_the_fused_operator_has_no_scores_and_says_what_to_do() -> None:
    _, site = attention(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert not site.maskings
    for name, words in (("scores", 'fused operator.*attn_implementation="eager"'), ("mask", "the mask is causal")):
        with pytest.raises(SiteRefusedError, match=f"(?s){words}"):
            stage(site, name)
