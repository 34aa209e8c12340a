"""Sources: what they name and what they read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gatecc.ir.gates.layout import GateShape, SourceShape
from gatecc.ir.gates.source import Source

B, N, C = 2, 5, 3


def read(text: str, shapes: list[SourceShape], *xs: Tensor) -> tuple[Tensor, str]:
    value = torch.randn(B, N, 4)
    shape = GateShape("bnc", {"c": 4, "h": 2}, tuple(shapes))
    source = Source.parse(text)
    got = source.read(shape, shapes, value, xs)
    assert got.at == source.positions(shape, shapes)
    assert got.x.size(-1) == source.channels(shapes)
    return got


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pooling_reads_samples(kind: str) -> None:
    x = torch.randn(B, C, 4, 6)
    pooled, at = read(f"pool(in, kind={kind})", [SourceShape("bcyx", C)], x)
    assert at == "b"
    torch.testing.assert_close(pooled, x.mean((2, 3)) if kind == "mean" else x.amax((2, 3)))


def test_a_concatenation_repeats_what_has_no_tokens() -> None:
    skip, branch, t = torch.randn(B, N, C), torch.randn(B, N, C), torch.rand(B)
    shapes = [SourceShape("bnc", C), SourceShape("bnc", C), SourceShape("b")]
    got, at = read("pool(skip)+branch+cond(t)", shapes, skip, branch, t)
    assert at == "bn"
    want = [skip.mean(1, keepdim=True).expand(B, N, C), branch, t[:, None, None].expand(B, N, 1)]
    torch.testing.assert_close(got, torch.cat(want, -1))


def test_merged_heads_are_channels() -> None:
    heads = torch.randn(B, 2, N, C)
    for axes, laid in (("bhnd", heads), ("gnd", heads.flatten(0, 1)), ("bnhd", heads.transpose(1, 2))):
        got, at = read("self", [SourceShape(axes, 2 * C)], laid)
        assert at == "bn"
        torch.testing.assert_close(got, heads.transpose(1, 2).flatten(2))


def test_the_statistics_of_logits() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    logits = torch.log(p.clamp_min(1e-30)).requires_grad_()
    got, at = read("logits", [SourceShape("bc", 3)], logits)
    assert at == "b"
    assert not got.requires_grad
    entropy = 1.5 * math.log(2) / math.log(3)
    powered = -(2 / 3 * math.log(2 / 3) + 2 / 6 * math.log(1 / 6)) / math.log(3)
    torch.testing.assert_close(
        got, torch.tensor([[0.5, entropy, 0.25, powered], [1.0, 0.0, 1.0, 0.0]]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("text", "refs"),
    [
        ("hidden", ["hidden"]),
        ("param", []),
        ("logits", ["logits"]),
        ("logits(of=out)", ["out"]),
        ("pool(skip)+pool(branch)", ["skip", "branch"]),
        ("a+(b+c)", ["a", "b", "c"]),
    ],
)
def test_refs(text: str, refs: list[str]) -> None:
    assert [str(r) for r in Source.parse(text).refs] == refs
