"""Values in another order of axes, against an einsum-like reference that knows each axis by its size."""

from __future__ import annotations

import pytest
import torch

from gatecc.passes.axes import arranged

B, N, H, R, D = 2, 3, 4, 2, 5  # H heads, R of which share a key head
PLAIN = torch.arange(B * H * N * D).view(B, H, N, D)


def spelled(axes: str, heads: int = H) -> torch.Tensor:
    """`PLAIN` (its first ``heads``) in some axes, built by hand for each of them."""
    x = PLAIN[:, :heads]
    if "r" in axes:
        order = ["bhrnd".index(a) for a in axes]
        return torch.stack([x[:, r::R] for r in range(R)], 2).permute(order)
    if "c" in axes:
        joined = torch.cat([x[:, h] for h in range(heads)], -1)
        return joined.permute(["bnc".index(a) for a in axes])
    if "g" in axes:
        merged = torch.stack([x[b, h] for b in range(B) for h in range(heads)])
        return merged.permute(["gnd".index(a) for a in axes])
    return x.permute(["bhnd".index(a) for a in axes])


FORMS = ("bhnd", "bnhd", "nbhd", "gnd", "gdn", "bhrnd", "bnhrd", "brhnd", "bnrhd")


@pytest.mark.parametrize("have", [*FORMS, "bnc", "bcn"])
@pytest.mark.parametrize("want", FORMS)
def test_every_form_becomes_every_other(have: str, want: str) -> None:
    assert torch.equal(arranged(spelled(have), have, want, H, R), spelled(want))


@pytest.mark.parametrize("axes", ["bnc", "bcn", "nbc"])
def test_channels_stay_channels(axes: str) -> None:
    assert torch.equal(arranged(spelled(axes), axes, "bnc"), spelled("bnc"))
    assert torch.equal(arranged(spelled("bnc"), "bnc", axes), spelled(axes))


@pytest.mark.parametrize("have", ["bhnd", "bnhd", "gnd"])
@pytest.mark.parametrize("want", ["bhnd", "bnhd", "gnd", "bnhrd"])
def test_shared_heads_come_once_per_query_head(have: str, want: str) -> None:
    got = arranged(spelled(have, heads=2), have, want, 2, R, repeat=R)
    plain = torch.stack([PLAIN[:, h // R] for h in range(H)], 1)
    assert torch.equal(arranged(got, want, "bhnd", H), plain)


def test_what_is_in_order_is_not_touched() -> None:
    assert arranged(PLAIN, "bhnd", "bhnd") is PLAIN
