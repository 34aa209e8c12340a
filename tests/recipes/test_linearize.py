"""GLA and its relatives, against the recurrence written in Python, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gatecc
from gatecc.errors import CallNotCapturedError, SiteRefusedError
from gatecc.ops.linear_attention.gates import log_decay
from tests.recipes.checks import case, causal, gradients, new_parameters, randomise, reverted
from tests.recipes.tiny import HEAD, HEADS, reference, tiny

X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(9))


def gap(model: torch.nn.Module, other: torch.nn.Module, x: Tensor) -> float:
    """The largest difference; no promise of an identity."""
    with torch.no_grad():
        return float((model(x) - other(x)).abs().max())


def _heads(x: Tensor, projection: Any) -> Tensor:
    """(B, N, C) -> (B, H, N, D) with keys and values repeated for their group."""
    y = projection(x).unflatten(-1, (-1, HEAD)).transpose(1, 2)
    return y.repeat_interleave(HEADS // y.size(1), 1)


def _token_by_token(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None = None) -> Tensor:
    """o_t = S_t^T q_t, one token after another; decay (B, H, N, D or 1) in (0, 1]."""
    state = torch.zeros(*q.shape[:2], q.size(-1), v.size(-1))
    outs: list[Tensor] = []
    for t in range(q.size(2)):
        state = state * decay[:, :, t].unsqueeze(-1)
        new = v[:, :, t]
        if beta is not None:
            new = beta[:, :, t] * (new - (state * k[:, :, t, :, None]).sum(-2))
        state = state + k[:, :, t, :, None] * new[:, :, None]
        outs.append((state * q[:, :, t, :, None]).sum(-2))
    return torch.stack(outs, 2)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def _convolved(x: Tensor, conv: Any) -> Tensor:
    """A causal depthwise convolution, tap by tap."""
    weight = conv.weight.view(x.size(1), x.size(3), -1)
    taps = weight.size(-1)
    padded = F.pad(x, (0, 0, taps - 1, 0))
    return torch.stack([padded[:, :, i : i + x.size(2)] * weight[None, :, None, :, i] for i in range(taps)]).sum(0)


def _gla(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    score = m.decays[0].up(m.decays[0].down(x)).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
    return _rms(_token_by_token(q * HEAD**-0.5, k, v, torch.sigmoid(score) ** (1 / 16)), m.norm.weight)


def _retention(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decay = (
        torch.tensor([1 - 2.0 ** (-5 - h) for h in range(HEADS)]).view(1, -1, 1, 1).expand(x.size(0), -1, x.size(1), 1)
    )
    return _rms(_token_by_token(q * HEAD**-0.5, k, v, decay), m.norm.weight)


def _scalar(m: Any, x: Tensor) -> Tensor:
    rate = F.softplus(m.decays[0].rate(x))
    return torch.exp(-m.decays[0].log_a.exp() * rate).transpose(1, 2).unsqueeze(-1)


def _scalar_decay(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _rms(_token_by_token(q * HEAD**-0.5, k, v, _scalar(m, x)), m.norm.weight)


def _delta(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    beta = torch.sigmoid(m.beta(x)).transpose(1, 2).unsqueeze(-1)
    q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
    return _rms(_token_by_token(q * HEAD**-0.5, k, v, _scalar(m, x), beta), m.norm.weight)


CASES: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "gla": ({}, _gla),
    "retention": ({}, _retention),
    "scalar-decay": ({}, _scalar_decay),
    "gated-delta-net": ({"conv": 0}, _delta),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_token_by_token(name: str) -> None:
    options, hand = CASES[name]
    plain = tiny(causal=True)
    model: Any = gatecc.transform(plain, gatecc.recipe(name, **options), (X,), verify=False)
    new = new_parameters(model, plain)
    randomise(new.values(), 0.3)

    def at(place: str, layer: int, value: Tensor, **seen: Tensor) -> Tensor:
        if place != "heads":
            return value
        attn, x = model.blocks[layer].attn, seen["x"]
        heads = hand(attn.mixer, x, *(_heads(x, p) for p in (attn.q_proj, attn.k_proj, attn.v_proj)))
        return heads * F.silu(x @ attn.gate.weight.T).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)

    assert gap(model, reference(plain, at), X) <= 1e-5
    assert gap(model, reference(plain, at), X[:1, :4]) <= 1e-5
    assert causal(model, X, 3)
    gradients(model, new, model(X))
    reverted(model, plain, (X,))


def test_convolutions_start_as_the_identity_and_act() -> None:
    plain = tiny(causal=True)
    without, model = (gatecc.transform(plain, gatecc.recipe("gla", conv=c), (X,), verify=False) for c in (0, 3))
    model.load_state_dict(without.state_dict(), strict=False)
    assert gap(model, without, X) <= 1e-6
    randomise(p for name, p in new_parameters(model, plain).items() if "convs" in name)

    def at(place: str, layer: int, value: Tensor, **seen: Tensor) -> Tensor:
        names = {"q": 0, "k": 1, "v": 2}
        if place not in names:
            return value
        attn: Any = model.get_submodule(f"blocks.{layer}.attn")
        return _convolved(value, attn.mixer.convs[names[place]])

    # the reference convolves in Python before the same mixer without convolutions
    hand = gatecc.transform(reference(plain, at), gatecc.recipe("gla", rope=True), (X,), verify=False)
    hand.load_state_dict(without.state_dict())
    assert gap(model, hand, X) <= 1e-5
    assert causal(model, X, 3)


def test_both_directions_under_a_bidirectional_mask() -> None:
    """Reversing the tokens and swapping the decays of the directions reverses the output."""
    plain = tiny(layers=1)
    model: Any = gatecc.transform(plain, gatecc.recipe("gla"), (X,), verify=False)
    randomise(new_parameters(model, plain).values(), 0.3)
    assert not causal(model, X, 3)
    with torch.no_grad():
        straight = model(X)
        one, other = model.blocks[0].attn.mixer.decays
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            a.data, b.data = b.data, a.data
        assert torch.allclose(model(X.flip(1)).flip(1), straight, atol=1e-5)
        assert not torch.allclose(model(X), straight, atol=1e-3)


def test_kept_layers_stay_softmax() -> None:
    plain = tiny(layers=4, causal=True)
    model = gatecc.transform(plain, gatecc.recipe("gla", keep="3::4", gate=False), (X,), verify=False)
    assert {name.rpartition(".mixer")[0] for name in new_parameters(model, plain)} == {
        f"blocks.{i}.attn" for i in range(3)
    }
    with pytest.raises(gatecc.GateccError, match="selects no site"):
        gatecc.transform(plain, gatecc.recipe("gla", keep="0:"), (X,))


def test_a_cache_is_refused_with_a_pointer_to_the_decoder() -> None:
    """One that the caller made; `generate` brings the decoder's own: tests/decoder/test_serving.py."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)).eval()
    ids = torch.arange(12).view(2, 6)
    model: Any = gatecc.transform(llama, "gla", {"input_ids": ids}, verify=False)
    with pytest.raises(CallNotCapturedError, match=r"gatecc\.decoder"):
        model(ids, past_key_values=DynamicCache(config=llama.config), use_cache=True)


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_that_makes_its_mask_compiles_and_exports(padded: bool) -> None:
    """transformers makes a mask for padding and while a compiler looks on; the example need not have shown one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, use_cache=False)).eval()
    ids = torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    model: Any = gatecc.transform(
        llama, "gla", {"input_ids": ids, **({"attention_mask": mask} if padded else {})}, verify=False
    )
    with torch.no_grad():
        model(ids)  # and without one
        expected = model(ids, attention_mask=mask).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, attention_mask=mask).logits
        program = torch.export.export(model, (ids, mask), strict=False)
        torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(program.module()(ids, mask).logits, expected, atol=1e-5, rtol=0)


def test_a_mask_that_is_not_proved_is_refused() -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))

    with pytest.raises(SiteRefusedError, match="of which the model makes its mask"):
        gatecc.transform(Masked(), "gla", (X, torch.ones(7, 7, dtype=torch.bool)))


@pytest.mark.parametrize("name", ["hf/llama-eager", "hf/gpt2-sdpa"])
def test_real_models(name: str) -> None:
    known = case(name)
    model = gatecc.transform(known.model, gatecc.recipe("gla", gate=False), known.inputs, verify=False)
    new = new_parameters(model, known.model)
    gradients(model, new, model(*known.args, **known.kwargs))
    reverted(model, known.model, known.args, known.kwargs)


def test_memories_of_many_lengths() -> None:
    """With ``longest`` the decays of a head's channels spread from 2 to that many tokens until one half is left."""
    plain = tiny(layers=1, causal=True)
    options: dict[str, Any] = {"feature": "hedgehog", "rope": True, "normalize": True, "norm": False, "gate": False}
    model: Any = gatecc.transform(plain, gatecc.recipe("gla", longest=256.0, **options), (X,), verify=False)
    with torch.no_grad():
        decay = log_decay(model.blocks[0].attn.mixer.decays[0](X), 16.0)
    halves = 0.5 ** (1 / torch.tensor([2.0, *(2 * 128 ** (i / 7) for i in range(1, 7)), 256.0]))
    assert torch.allclose(decay.exp(), halves.expand_as(decay), atol=1e-5)
    one = torch.full_like(X, 0.3)  # equal values: an average of them is each of them
    with torch.no_grad():
        assert torch.allclose(model(one)[:, :1], model(one)[:, -1:], atol=1e-4)
