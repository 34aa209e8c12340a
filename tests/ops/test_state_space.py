"""The common form: against the operators, by hand, and between layers that are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ops.linear_attention import linear_attention
from gatecc.ops.state_space import StateSpace, gap, linear, of_weights, selective, softmax


def draws(tokens: int = 6, heads: int = 2, groups: int = 2, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    size = (2, groups, tokens)
    return {
        "q": torch.randn(2, heads, tokens, 3).double(),
        "k": torch.randn(*size, 3).double(),
        "v": torch.randn(*size, 4).double(),
        "log_decay": F.logsigmoid(torch.randn(*size, 3)).double(),
        "beta": torch.rand(*size).double(),
        "initial_state": torch.randn(2, heads, 3, 4).double(),
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.sampled_from((1, 2)), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_linear_is_the_operator(
    tokens: int, groups: int, decays: bool, deltas: bool, starts: bool, padded: bool
) -> None:
    x = draws(tokens, groups=groups, seed=tokens)
    used = {"log_decay": decays, "beta": deltas, "initial_state": starts}
    chosen: dict[str, Any] = {name: value for name, value in x.items() if used.get(name, True)}
    mask = torch.arange(tokens) >= torch.tensor([[0], [2]]) if padded else None
    y, state = linear(**chosen, mask=mask, scale=0.7).run()
    o, last = linear_attention(**chosen, mask=mask, scale=0.7)
    assert torch.allclose(y, o, atol=1e-12)
    assert torch.allclose(state, last, atol=1e-12)


def test_the_normaliser_is_part_of_c() -> None:
    x = draws()
    arguments: dict[str, Any] = {name: x[name].abs() if name in "qk" else x[name] for name in ("q", "k", "v")}
    arguments["log_decay"] = x["log_decay"]
    form = linear(**arguments, normalize=True)
    assert torch.allclose(form.run()[0], linear_attention(**arguments, normalize=True)[0], atol=1e-12)
    assert torch.allclose(form.kernel().sum(-1), torch.ones(2, 2, 6).double()), "an average of values"


def test_softmax_is_attention_over_the_cache() -> None:
    x = draws(heads=4, groups=2)
    q, k, v = x["q"], x["k"], x["v"]
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    form = softmax(q, k, v)
    assert torch.allclose(form.run()[0], wanted, atol=1e-12)
    assert torch.allclose(form.run()[1], v.repeat_interleave(2, 1)), "the state is the cache"
    near = softmax(q, k, v, window=2).kernel()
    assert not bool(near.tril(-2).any())
    assert torch.allclose(near.sum(-1), torch.ones(2, 4, 6).double())


def test_s6_is_mambas_scan() -> None:
    """Against the mixer of transformers, from its weights."""
    from transformers import MambaConfig, MambaModel

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=8, hidden_size=6, state_size=3, num_hidden_layers=1, time_step_rank=2)
    model: Any = MambaModel(config).double().eval()
    mixer = model.layers[0].mixer
    hidden = torch.randn(2, 7, 6).double()
    with torch.no_grad():
        x, gate = mixer.in_proj(hidden).mT.chunk(2, 1)
        x = F.silu(mixer.conv1d(x)[..., :7]).mT
        rank, b, c = mixer.x_proj(x).split([2, 3, 3], -1)
        delta = F.softplus(mixer.dt_proj(rank))
        form = selective(x, delta, -mixer.A_log.exp(), b, c, mixer.D)
        y = form.run()[0].squeeze(-1) * F.silu(gate)
        assert torch.allclose(mixer.out_proj(y.mT), mixer(hidden), atol=1e-6)
    assert form.transition == "diagonal"
    assert form.state == 3


def test_s6_is_gated_linear_attention() -> None:
    torch.manual_seed(0)
    x, delta = torch.randn(2, 6, 5).double(), torch.rand(2, 6, 5).double()
    a, b, c = -torch.rand(5, 3).double(), torch.randn(2, 6, 3).double(), torch.randn(2, 6, 3).double()
    step = delta.mT.unsqueeze(-1)
    q = c.unsqueeze(1).expand(-1, 5, -1, -1)
    gated = linear(q, step * b.unsqueeze(1), x.mT.unsqueeze(-1), step * a[:, None], scale=1.0)
    assert gap(selective(x, delta, a, b, c), gated) <= 1e-12
    y, _ = linear_attention(q, step * b.unsqueeze(1), x.mT.unsqueeze(-1).contiguous(), step * a[:, None], scale=1.0)
    assert torch.allclose(selective(x, delta, a, b, c).run()[0], y, atol=1e-12)
    skip = selective(x, delta, a, b, c, torch.ones(5)).kernel() - selective(x, delta, a, b, c).kernel()
    assert torch.allclose(skip, torch.eye(6).double().expand(2, 5, -1, -1)), "D is the diagonal"


def test_what_is_the_same_layer() -> None:
    x = draws()
    q, k, v = x["q"], x["k"], x["v"]
    plain = linear(q, k, v)
    assert plain.transition == "identity"
    assert gap(linear(q, k, v, torch.zeros_like(k)), plain) == 0, "GLA without decay is linear attention"
    one = x["log_decay"][..., :1]
    assert linear(q, k, v, one).transition == "scalar"
    assert gap(linear(q, k, v, one), linear(q, k, v, one.expand_as(k))) == 0, "Mamba-2's decay is one for all channels"
    delta = linear(q, k, v, x["log_decay"], x["beta"])
    assert (delta.transition, linear(q, k, v, x["log_decay"]).transition) == ("full", "diagonal")
    unit = F.one_hot(torch.arange(6) % 3, 3).double().expand(2, 2, -1, -1)[:, :, :3]
    short = [t[:, :, :3] for t in (q, v)]
    ones = torch.ones(2, 2, 3)
    orthogonal = linear(short[0], unit, short[1], None, ones), linear(short[0], unit, short[1])
    assert gap(*orthogonal) <= 1e-12, "with orthogonal keys there is nothing to correct"
    assert gap(delta, plain) > 0.1


def test_the_kernel_is_the_product_of_transitions() -> None:
    x = draws()
    form = linear(*(x[name] for name in ("q", "k", "v", "log_decay", "beta")))
    kernel = form.kernel()
    for t in range(6):
        for s in range(6):
            through = form.b[:, :, s].unsqueeze(-1)
            for r in range(s + 1, t + 1):
                through = form.a[:, :, r] @ through
            wanted = (form.c[:, :, t].unsqueeze(-2) @ through)[..., 0, 0] * (s <= t)
            assert torch.allclose(kernel[:, :, t, s], wanted, atol=1e-12)
    assert torch.allclose(kernel @ form.u, form.run()[0], atol=1e-12)


def test_forms_of_one_input_add_up() -> None:
    x = draws()
    arguments = [x[name] for name in ("q", "k", "v")]
    one, other = linear(*arguments, initial_state=x["initial_state"]), softmax(*arguments)
    full = linear(*arguments, beta=x["beta"])
    both = one.scaled(0.25) + other.scaled(0.75) + full
    assert both.state == one.state + other.state + full.state
    wanted = 0.25 * one.run()[0] + 0.75 * other.run()[0] + full.run()[0]
    assert torch.allclose(both.run()[0], wanted, atol=1e-12)
    with pytest.raises(ArgumentError, match="one input"):
        one.__add__(linear(x["q"], x["k"], x["v"] + 1))


def test_what_has_no_form_is_refused() -> None:
    x = draws()
    with pytest.raises(ArgumentError, match="look ahead"):
        of_weights(torch.ones(2, 2, 6, 6), x["v"])
    with pytest.raises(ArgumentError, match="normaliser"):
        linear(x["q"], x["k"], x["v"], beta=x["beta"], normalize=True)
    form = linear(x["q"], x["k"], x["v"])
    with pytest.raises(ArgumentError, match="other shapes"):
        gap(form, StateSpace(form.a[:, :1], form.b[:, :1], form.c[:, :1], form.u[:, :1]))
