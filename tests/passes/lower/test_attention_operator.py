"""attention-operator: fused attention becomes the operator with the same numbers and gradients, or stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc import backend
from gatecc.passes.lower import Outcome, attention_operator

B, N, H, D = 2, 9, 4, 8


@pytest.fixture(autouse=True)
def gaining(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator gains everywhere, so that small models show it."""
    monkeypatch.setattr(attention_operator, "gain", lambda *_, **__: 2.0)
    torch._dynamo.reset()


class Attention(nn.Module):
    """One attention of x: (B, N, 32) by ``attend``, a function of q, k, v: (B, H, N, D)."""

    def __init__(self, attend: Callable[..., Tensor], groups: int = H) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(H * D, H * D), nn.Linear(H * D, 2 * groups * D)
        self.attend = attend

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """x: (B, N, 32)."""
        q = self.q(x).unflatten(-1, (-1, D)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (-1, D)).transpose(1, 2).chunk(2, 1)
        return self.attend(q, k, v, *others).transpose(1, 2).flatten(2)


def seen(x: Tensor, window: int = 0) -> Tensor:
    places = torch.arange(x.size(2))
    ahead = places - places[:, None]
    return (ahead <= 0) & (ahead > -window) if window else ahead <= 0


def additive(q: Tensor) -> Tensor:
    return torch.zeros(1, 1, q.size(2), q.size(2), dtype=q.dtype).masked_fill(~seen(q, 4), torch.finfo(q.dtype).min)


def padded(q: Tensor, k: Tensor, v: Tensor, there: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, seen(q) & there[:, None, None, :])


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma 2."""
    scores = torch.tanh(q @ k.mT * D**-0.5 / 1.5) * 1.5
    return scores.masked_fill(~seen(q), -torch.inf).softmax(-1) @ v


def narrow_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-head latent attention."""
    weights = (q @ k.mT).masked_fill(~seen(q, 4), -torch.inf).softmax(-1)
    return torch.cat((weights @ v[..., :5], v[..., 5:]), -1)


class Sunk(nn.Module):
    """gpt-oss: a learned logit for each head takes part in the softmax; its weight is cut off."""

    def __init__(self, window: int = 0, groups: int = H, first: bool = False) -> None:
        super().__init__()
        self.logits, self.window, self.groups, self.first = nn.Parameter(torch.randn(H)), window, groups, first

    def forward(self, q: Tensor, k: Tensor, v: Tensor, there: Tensor | None = None) -> Tensor:
        k, v = (x[:, :, None].expand(-1, -1, H // self.groups, -1, -1).flatten(1, 2) for x in (k, v))
        scores = (q @ k.mT * 0.4).masked_fill(~seen(q, self.window), torch.finfo(q.dtype).min)
        if there is not None:
            scores = scores.masked_fill(~there[:, None, None], -torch.inf)
        logits = self.logits.view(1, -1, 1, 1).expand(q.size(0), -1, q.size(2), -1)
        joined = torch.cat((logits, scores) if self.first else (scores, logits), -1)
        weights = (joined - joined.amax(-1, keepdim=True)).softmax(-1)
        return (weights[..., 1:] if self.first else weights[..., :-1]) @ v


def quiet(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A query may look at nothing: one is added to the sum of the exponentials."""
    scores = q @ k.mT
    joined = torch.cat((scores, scores.new_zeros(*scores.shape[:3], 1)), -1)
    return joined.softmax(-1).narrow(-1, 0, k.size(2)) @ v


sdpa: Any = F.scaled_dot_product_attention
MODELS: dict[str, tuple[Callable[..., Tensor], int, str]] = {
    "causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), H, "gatecc::attention, causal"),
    "groups": (
        lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True, scale=0.3),
        2,
        "gatecc::attention, causal",
    ),
    "one key head": (lambda q, k, v: sdpa(q, k, v), 1, "gatecc::attention"),
    "full": (lambda q, k, v: sdpa(q, k, v), H, "gatecc::attention"),
    "window": (lambda q, k, v: sdpa(q, k, v, seen(q, 4)), H, "gatecc::attention, causal, window=4"),
    "additive window": (lambda q, k, v: sdpa(q, k, v, additive(q)), H, "gatecc::attention, causal, window=4"),
    "padding": (padded, H, "gatecc::attention, causal, with a mask"),
    "bias": (lambda q, k, v, x: sdpa(q, k, v, x[:, None, :, :N]), H, "gatecc::attention, with a mask"),
    "capped": (capped, H, "gatecc::attention, scores capped at 1.5"),
    "sinks": (Sunk(), H, "gatecc::attention, sinks"),
    "sinks before shared keys of a window": (Sunk(4, 2, True), 2, "gatecc::attention, sinks"),
    "sinks beside padding": (Sunk(), H, "gatecc::attention, sinks"),
    "quiet": (quiet, H, "gatecc::attention, sinks"),
    "narrow values": (narrow_values, H, "gatecc::attention, values of another width"),
}


LEFT: dict[str, tuple[Callable[..., Tensor], str]] = {
    "dropout": (lambda q, k, v: sdpa(q, k, v, dropout_p=0.1), "dropped out"),
    "fewer queries": (lambda q, k, v: sdpa(q[:, :, 2:], k, v, is_causal=True), "more keys than queries"),
    "three axes": (lambda q, k, v: sdpa(q[0], k[0], v[0])[None], "four axes"),
    "one batch of keys": (lambda q, k, v: sdpa(q, k[:1], v[:1]), "broadcast"),
}


def compiled(model: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], list[Outcome]]:
    outcomes: list[Outcome] = []

    def spy(graph_module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        lowered = backend.lower(graph_module, example)
        assert not lowered.faults
        outcomes.extend(o for o in lowered.outcomes if o.lowering == "attention-operator")
        calls = lowered.graph.graph.find_nodes(op="call_function", target=torch.ops.gatecc.attention.default)
        assert len(calls) == sum(bool(o.became) for o in outcomes)
        return lowered.graph.forward

    return torch.compile(model, backend=spy, **options), outcomes


def given(name: str) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(B, N, H * D, dtype=torch.float64)
    there = torch.tensor([[False] * 2 + [True] * 7, [True] * 9])
    others = {"padding": (there,), "sinks beside padding": (there,), "bias": (x,)}
    return (x, *others.get(name, ()))


@pytest.mark.parametrize("name", MODELS)
def test_what_it_becomes(name: str) -> None:
    attend, groups, became = MODELS[name]
    model, inputs = Attention(attend, groups).double(), given(name)
    function, outcomes = compiled(model)
    found, expected = function(*inputs), model(*inputs)
    assert [o.became for o in outcomes] == [became]
    assert outcomes[0].reason
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    grads = [torch.autograd.grad((y * weights).sum(), list(model.parameters())) for y in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", LEFT)
def test_what_stays(name: str) -> None:
    attend, reason = LEFT[name]
    function, outcomes = compiled(Attention(attend).double())
    function(*given(name))
    assert [bool(o.became) for o in outcomes] == [False]
    assert reason in outcomes[0].reason


def test_free_lengths_and_kernels() -> None:
    model = Attention(MODELS["causal"][0])
    function, outcomes = compiled(model, dynamic=True)
    for length in (9, 150, 41):
        x = torch.randn(B, length, H * D)
        torch.testing.assert_close(function(x), model(x), rtol=2e-5, atol=2e-6)
    assert [bool(o.became) for o in outcomes] == [True]


def test_it_stays_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_operator, "gain", lambda *_, **__: 1.01)
    function, outcomes = compiled(Attention(MODELS["causal"][0]).double())
    function(*given("causal"))
    assert "1.01 times" in outcomes[0].reason
    assert not outcomes[0].became


def test_gpt_oss() -> None:
    """A layer with a window and one without; values and gradients against float64, sinks among them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    heads = dict(num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, vocab_size=50, sliding_window=4)
    config = transformers.GptOssConfig(**sizes, **heads, attn_implementation="eager", max_position_embeddings=64)
    model = transformers.GptOssModel(config).eval().double()
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.sinks.normal_()
    attentions, x = nn.ModuleList(layer.self_attn for layer in model.layers), torch.randn(B, 12, 32).double()

    def run(x: Tensor) -> Tensor:
        places = torch.arange(x.size(1))
        turned, ahead = model.rotary_emb(x, places[None]), places - places[:, None]
        for layer, window in zip(attentions, (4, 64), strict=True):
            hidden = (ahead > 0) | (ahead <= -window)
            mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, torch.finfo(x.dtype).min)[None, None]
            x = x + layer(x, position_embeddings=turned, attention_mask=mask, cache=None)[0]
        return x

    function, outcomes = compiled(run, dynamic=True)
    for given in (x, torch.randn(B, 9, 32).double()):
        found, expected = function(given), run(given)
        torch.testing.assert_close(found, expected)
        parameters = list(attentions.parameters())
        grads = [torch.autograd.grad(y.square().sum(), parameters) for y in (found, expected)]
        torch.testing.assert_close(*grads)
    assert [o.became for o in outcomes] == ["gatecc::attention, sinks"] * 2
