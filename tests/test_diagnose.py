"""diagnose: massive activations, sinks, decays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gatecc
from gatecc import diagnose
from gatecc.errors import ArgumentError, EmptySelectionError
from tests.train.lm import VOCABULARY, pair


def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 12))


def test_a_planted_spike_is_found_where_it_was_planted() -> None:
    _, model = pair()
    x = torch.randint(1, VOCABULARY, (3, 12))
    x[1, 4] = 0
    assert not any(row.massive for row in diagnose.massive(model, (x,)))
    with torch.no_grad():
        model.embed.weight[0, 3] = 5000.0
    rows = diagnose.massive(model, (x,))
    assert [row.site for row in rows] == [f"layers.{i}#{j}" for i in (0, 1) for j in (0, 1)]
    for row in rows:
        assert row.massive
        assert row.where == (1, 4, 3)
        assert row.largest == pytest.approx(5000, rel=0.01)
        assert row.ratio > 1000
    (branch,) = diagnose.massive(model, (x,), gatecc.MLP[0].out)
    assert not branch.massive


def weights_of(model: Any, x: Tensor) -> list[Tensor]:
    """Attention weights by transformers' own account."""
    with torch.no_grad():
        return list(model(x, output_attentions=True).attentions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sinks_are_the_mean_weight_of_the_first_key(attention: str) -> None:
    config = hf.LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2, use_cache=False)  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    model.set_attn_implementation(attention)
    rows = diagnose.sinks(model, (x := ids(),))
    model.set_attn_implementation("eager")
    for row, weights in zip(rows, weights_of(model, x), strict=True):
        assert row.heads == pytest.approx(weights[:, :, 1:, 0].mean((0, 2)).tolist(), rel=1e-4)
        assert row.score == pytest.approx(float(weights[:, :, 1:, 0].mean()), rel=1e-4)


def test_a_gate_changes_the_sinks_above_it() -> None:
    _, model = pair()
    x = ids()
    gated = gatecc.transform(model, gatecc.recipe("gated-attention", init="random(std=2)"), (x,), verify=False)
    before, after = diagnose.sinks(model, (x,)), diagnose.sinks(gated, (x,))
    assert after[0].heads == pytest.approx(before[0].heads, rel=1e-5)
    assert max(abs(a - b) for a, b in zip(after[1].heads, before[1].heads, strict=True)) > 1e-3


def test_only_what_is_there_can_be_read() -> None:
    _, model = pair()
    with pytest.raises(EmptySelectionError):
        diagnose.massive(model, (ids(),), gatecc.Conv[...].out)
    with pytest.raises(ArgumentError, match="of attention"):
        diagnose.sinks(model, (ids(),), gatecc.MLP[...])
    assert diagnose.decay(model, (ids(),)) == []


@given(half=st.floats(0.2, 5000), length=st.integers(2, 64))
def test_decays_are_reported_as_half_lives(half: float, length: int) -> None:
    row = diagnose.decay_of(torch.full((2, 3, length, 4), -math.log(2) / half, dtype=torch.float64), length=length)
    assert row.half_life == pytest.approx((half,) * 3)
    assert row.forgets == float(half < 1)
    assert row.keeps == float(half > length)


class Forgetful(torch.nn.Module):
    """A layer that calls the operator itself; its channels have half-lives of 2 to 1000 tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        decay = -math.log(2) / torch.tensor([2.0, 10.0, 100.0, 1000.0])
        out = torch.ops.gatecc.linear_attention(q, q, q, decay.expand(q.shape).contiguous())[0]
        return out.transpose(1, 2).flatten(2)


def test_the_decays_of_a_model_are_found_in_python_and_in_scopes() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Sequential(Forgetful(), Forgetful()))
    rows = diagnose.decay(model, (torch.randn(2, 20, 8),))
    assert [row.site for row in rows] == ["1.0#0", "1.1#0"]
    for row in rows:
        assert row.half_life == pytest.approx((2, 10, 1000), rel=1e-5)
        assert row.keeps == 0.5
    _, lm = pair()
    mixed = gatecc.transform(lm, gatecc.recipe("gla", gate=False), (x := ids(),), verify=False)
    rows = diagnose.decay(mixed, (x,))
    assert [row.site for row in rows] == ["layers.0.attn#0", "layers.1.attn#0"]
    half = math.log(2) / (math.log(2) / 16)  # logsigmoid(0) / 16 at init
    assert rows[0].half_life[1] == pytest.approx(half, rel=0.5)


def test_the_ends_of_the_range_are_seen() -> None:
    none = diagnose.decay_of(torch.zeros(1, 2, 8, 4))
    assert none.half_life == (math.inf,) * 3
    assert none.keeps == 1
    all_at_once = diagnose.decay_of(torch.full((1, 2, 8, 1), -math.inf))
    assert all_at_once.half_life == (0.0,) * 3
    assert all_at_once.forgets == 1
    mixed = diagnose.decay_of(torch.tensor([-5.0, -5.0, -0.01, -1e-9]).expand(1, 2, 100, 4))
    assert (mixed.forgets, mixed.keeps) == (0.5, 0.25)
    with pytest.raises(ArgumentError, match="not positive"):
        diagnose.decay_of(torch.full((1, 1, 2, 1), 0.1))


def test_the_growth_of_a_massive_activation_is_fitted() -> None:
    curve = diagnose.Growth(5, 0.01, 0.02, 1.2, 3, 1)
    steps = list(range(0, 3000, 100))
    fit = diagnose.fit_growth(steps, [curve(t) for t in steps])
    assert fit.r2 > 0.9999
    assert all(abs(fit(t) - curve(t)) < 0.05 for t in range(50, 3000, 100))
    noise = torch.randn(30).tolist()
    assert diagnose.fit_growth(steps, noise).r2 < 0.7
    with pytest.raises(ArgumentError):
        diagnose.fit_growth([1, 2, 3], [1, 2, 3])


def test_weights_of_a_bidirectional_attention_count_every_query() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    model, x = Plain(), torch.randn(2, 6, 8)
    q, k = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (model.q, model.k))
    want = (q @ k.mT / 2).softmax(-1)[..., 0].mean((0, 2))
    assert diagnose.sinks(model, (x,))[0].heads == pytest.approx(want.tolist(), rel=1e-4)
