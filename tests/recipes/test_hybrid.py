"""Liger, LoLCATs and Hopfield layers, against their equations written in Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from tests.recipes.checks import causal, new_parameters, randomise, reverted
from tests.recipes.tiny import HEAD, HEADS, reference, tiny

X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(9))
SHAPE: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


def gap(model: torch.nn.Module, other: torch.nn.Module, x: Tensor) -> float:
    """The largest difference; no promise of an identity."""
    with torch.no_grad():
        return float((model(x) - other(x)).abs().max())


def _heads(x: Tensor, projection: Any) -> Tensor:
    y = projection(x).unflatten(-1, (-1, HEAD)).transpose(1, 2)
    return y.repeat_interleave(HEADS // y.size(1), 1)


def _distance(tokens: int) -> Tensor:
    at = torch.arange(tokens)
    return at[:, None] - at[None]


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    distance = _distance(q.size(2))
    scores = (q @ k.mT * HEAD**-0.5).masked_fill((distance < 0) | (distance >= window), float("-inf"))
    return scores.softmax(-1) @ v


def _gla_by_pairs(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """o_t = sum over s <= t of (q_t · k_s prod of the decays after s) v_s"""
    total = decay.log().cumsum(2)
    between = (total.unsqueeze(3) - total.unsqueeze(2)).exp()
    weights = (q.unsqueeze(3) * k.unsqueeze(2) * between).sum(-1)
    return weights.masked_fill(_distance(q.size(2)) < 0, 0.0) @ v


def test_liger_is_half_gla_half_window_without_new_parameters() -> None:
    plain = tiny(causal=True)
    model: Any = gatecc.transform(plain, gatecc.recipe("liger", window=3), (X,), verify=False)
    assert model.state_dict().keys() == plain.state_dict().keys()

    def at(place: str, layer: int, value: Tensor, **seen: Tensor) -> Tensor:
        if place != "heads":
            return value
        attn, x = model.blocks[layer].attn, seen["x"]
        q, k, v = (_heads(x, p) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        far = _gla_by_pairs(q.softmax(-1), k.softmax(-1), v, torch.sigmoid(k) ** (1 / 16))
        return 0.5 * far + 0.5 * _windowed(q, k, v, 3)

    assert gap(model, reference(plain, at), X) <= 1e-5
    assert gap(model, reference(plain, at), X[:1, :5]) <= 1e-5
    assert causal(model, X, 4)
    reverted(model, plain, (X,))


def test_lolcats_shares_one_denominator() -> None:
    plain = tiny(causal=True)
    model: Any = gatecc.transform(plain, gatecc.recipe("lolcats", window=3), (X,), verify=False)
    randomise(new_parameters(model, plain).values())

    def at(place: str, layer: int, value: Tensor, **seen: Tensor) -> Tensor:
        if place != "heads":
            return value
        attn, x = model.blocks[layer].attn, seen["x"]
        m = attn.mixer
        q, v = _heads(x, attn.q_proj), _heads(x, attn.v_proj)
        raw = attn.k_proj(x).unflatten(-1, (-1, HEAD)).transpose(1, 2)
        repeat = HEADS // raw.size(1)

        def features(y: Tensor, weight: Tensor) -> Tensor:
            z = 2 * torch.einsum("bhnd,hde->bhne", y, weight)
            return torch.cat([z, -z], -1).softmax(-1)

        phi_q = features(q, m.feature_q.weight)
        phi_k = features(raw, m.feature_k.weight).repeat_interleave(repeat, 1)
        distance = _distance(x.size(1))
        scores = q @ raw.repeat_interleave(repeat, 1).mT * HEAD**-0.5
        scores = scores.masked_fill((distance < 0) | (distance >= 3), float("-inf"))
        near = (scores - scores.amax(-1, keepdim=True)).exp() * torch.sigmoid(m.weight)
        far = (phi_q @ phi_k.mT).masked_fill(distance < 3, 0.0)
        weights = near + far
        return weights @ v / weights.sum(-1, keepdim=True)

    assert gap(model, reference(plain, at), X) <= 1e-5
    assert causal(model, X, 5)
    reverted(model, plain, (X,))


@pytest.mark.parametrize("is_causal", [True, False])
def test_hopfield_updates_its_queries(is_causal: bool) -> None:
    plain = tiny(causal=is_causal, layers=1)
    once = gatecc.transform(plain, gatecc.recipe("hopfield", steps=1), (X,), verify=False)
    assert gap(once, plain, X) <= 1e-6, "one step at the model's own scale is attention"
    model: Any = gatecc.transform(plain, gatecc.recipe("hopfield", steps=3, beta=0.7), (X,), verify=False)

    def at(place: str, layer: int, value: Tensor, **seen: Tensor) -> Tensor:
        if place != "heads":
            return value
        attn, x = model.blocks[layer].attn, seen["x"]
        q, k, v = (_heads(x, p) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        hidden = (_distance(x.size(1)) < 0) & is_causal

        def weights(xi: Tensor) -> Tensor:
            return (0.7 * xi @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1)

        for _ in range(2):
            q = weights(q) @ k
        return weights(q) @ v

    assert gap(model, reference(plain, at), X) <= 1e-5
    assert causal(model, X, 4) is is_causal


def test_liger_reads_keys_before_their_rotary_embedding_and_leaves_padding_out() -> None:
    """Left padding changes nothing for the tokens behind it: positions are given, the mask hides the rest."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2)
    llama = LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 32, (2, 8))
    pads = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    places = (pads.cumsum(-1) - 1).clamp(min=0)
    recipe = gatecc.recipe("liger", window=3)
    padded = gatecc.transform(
        llama, recipe, {"input_ids": ids, "attention_mask": pads, "position_ids": places}, verify=False
    )
    alone = gatecc.transform(llama, recipe, {"input_ids": ids}, verify=False)
    with torch.no_grad():
        got = padded(input_ids=ids, attention_mask=pads, position_ids=places).logits
        wanted = alone(input_ids=ids[:1, 3:]).logits
        assert torch.allclose(got[0, 3:], wanted[0], atol=1e-5)
        assert torch.allclose(got[1], alone(input_ids=ids).logits[1], atol=1e-5)
