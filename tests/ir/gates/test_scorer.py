"""Scorers, read through the gates that they make."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateModule, GateShape, GateSpec, SourceShape
from gatecc.ir.gates.layout import Features
from gatecc.ir.gates.scorer import Scorer

B, N, C, H = 2, 7, 6, 4


def gate(scorer: str, source: str = "hidden", axes: str = "bnc", value: str = "bnc", channels: int = C) -> GateModule:
    spec = GateSpec(source, scorer, "channel", "linear", init="random(std=1)")
    return spec.build(GateShape(value, {"c": H}, (SourceShape(axes, channels),))).eval()


def test_lowrank_is_two_matrices() -> None:
    g, x = gate("lowrank(2)"), torch.randn(B, N, C)
    want = x @ g.get_parameter("down").T @ g.get_parameter("weight").T + g.get_parameter("bias")
    torch.testing.assert_close(g(torch.randn(B, N, H), x), want)
    assert g.get_parameter("down").shape == (2, C)


def test_a_lookup_is_a_row_of_its_table() -> None:
    g = gate("lookup(5)", "cond(task)", "b", channels=1)
    task = torch.tensor([3, 0])
    assert torch.equal(g(torch.randn(B, N, H), task), g.get_parameter("weight")[task][:, None])
    with pytest.raises(ArgumentError, match="one integer"):
        gate("lookup(5)", "cond(task)", "bc", channels=2)


def test_attention_pooling_ignores_the_order_of_tokens() -> None:
    g, x = gate("attn"), torch.randn(B, N, C)
    out = g(torch.randn(B, N, H), x)
    assert out.shape == (B, 1, H)
    torch.testing.assert_close(g(torch.randn(B, N, H), x.flip(1)), out)
    weights = torch.softmax(x @ g.get_parameter("query")[0] / C**0.5, 1)
    want = F.linear((weights[..., None] * x).sum(1), g.get_parameter("weight"), g.get_parameter("bias"))
    torch.testing.assert_close(out[:, 0], want)


def test_a_recurrent_score_is_causal() -> None:
    g, x = gate("rnn(3)"), torch.randn(B, N, C)
    later = x.clone()
    later[:, 4:] = 0
    value = torch.randn(B, N, H)
    assert torch.equal(g(value, x)[:, :4], g(value, later)[:, :4])


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_over_pixels(kernel: int) -> None:
    g, x = gate(f"conv({kernel})", axes="bcyx", value="bcyx"), torch.randn(B, C, 5, 4)
    want = F.conv2d(x, g.get_parameter("weight"), g.get_parameter("bias"), padding=kernel // 2)
    torch.testing.assert_close(g(torch.randn(B, H, 5, 4), x), want)


def test_least_squares_recovers_a_linear_map() -> None:
    g = GateSpec("hidden", "lstsq", "channel", "linear", init="zero").build(
        GateShape("bnc", {"c": H}, (SourceShape("bnc", C),))
    )
    assert not any(p.requires_grad for p in g.parameters())
    value, x = torch.randn(8, N, H), torch.randn(8, N, C)
    weight, bias = torch.randn(H, C), torch.randn(H)
    g.fit(F.linear(x, weight, bias), value, x)
    torch.testing.assert_close(g.get_parameter("weight"), weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(g.get_parameter("bias"), bias, atol=1e-4, rtol=1e-4)
    with pytest.raises(ArgumentError, match="lstsq"):
        gate("linear").fit(value, value, x)


# -- the schedule of DTR -----------------------------------------------------------------------------------------------


def window(t: Tensor, beta: float, features: int = 64) -> Tensor:
    spec = GateSpec("cond(t)", f"schedule(beta={beta}, steps=100)", "channel", "linear")
    g = spec.build(GateShape("bnc", {"c": features}, (SourceShape("b"),)))
    return g(torch.randn(len(t), N, features), t)[:, 0]


def test_the_window_has_its_size_and_moves() -> None:
    t = torch.arange(0, 101)
    mask = window(t, 0.8)
    assert mask.shape == (101, 64)
    assert (mask.sum(-1) == 51).all()
    assert mask[0, :51].all()
    assert mask[100, 13:].all()
    overlap = mask @ mask.T
    assert overlap[50, 51] >= overlap[50, 60] >= overlap[50, 100]
    assert (mask[1:] >= mask[:-1]).float().mean() > 0.9


def test_a_full_window_is_the_identity() -> None:
    assert torch.equal(window(torch.arange(5), 1.0), torch.ones(5, 64))
    whole = GateSpec("cond(t)", "schedule(beta=1)", "channel", "linear")
    assert whole.contract().kind == "exact"
    assert GateSpec("cond(t)", "schedule(beta=0.5)", "channel", "linear").contract().kind == "changes_function"


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ArgumentError, match="empty"):
        window(torch.arange(3), 0.01)


def test_cosine_standardises_both_sides() -> None:
    x, v = torch.randn(2, 5, 16), torch.randn(3, 16)
    cosine = Scorer.parse("cosine")

    def standard(t: torch.Tensor) -> torch.Tensor:
        return (t - t.mean(-1, keepdim=True)) / (t.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    expected = torch.einsum("bnc,ec->bne", standard(x), standard(v)) / 4
    torch.testing.assert_close(cosine(Features(x, "bn"), {"weight": v}, 3).x, expected)
    more = torch.cat([v, torch.zeros(1, 16)])
    scores = cosine(Features(x, "bn"), {"weight": more}, 4).x
    torch.testing.assert_close(scores[..., :3], expected)
    assert (scores[..., 3] == 0).all()
