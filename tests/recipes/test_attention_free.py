"""RRNCO's attention-free module, against its sums written token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.passes.mix.mixers import AttentionFree, Place
from gatecc.passes.mix.mixers.attention_free import angles
from tests.graphs import attention, done
from tests.recipes.checks import gradients, new_parameters, randomise, reverted
from tests.recipes.replaced import by_hand, gap, heads, merged

PLACE = Place(dim=8, heads=2, kv_heads=2, key=4, value=4, scale=0.5, causal=False)


def _weighted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    """bias: (B, N, N), keep: (B, N); a sum over keys for every query and channel."""
    outs = torch.zeros_like(q)
    for b in range(q.size(0)):
        seen = keep[b].nonzero().flatten()
        of_keys = torch.exp(k[b][:, seen].softmax(1))  # (H, M, D)
        for t in range(q.size(2)):
            weights = torch.exp(bias[b, t, seen].softmax(0))[:, None] * of_keys
            outs[b, :, t] = torch.sigmoid(q[b, :, t]) * (weights * v[b][:, seen]).sum(1) / weights.sum(1)
    return outs


def _bias(m: Any, pairs: list[Tensor]) -> Tensor:
    """A, an embedding at a time."""
    made = [e[2](F.relu(x[..., None] * e[0].weight[:, 0] + e[0].bias)) for e, x in zip(m.embed, pairs, strict=True)]
    if len(made) == 1:
        mixed = made[0]
    elif len(made) == 2:
        g = torch.sigmoid(torch.cat(made, -1) @ m.gate.weight.T + m.gate.bias)
        mixed = g * made[0] + (1 - g) * made[1]
    else:
        g = ((torch.cat(made, -1) @ m.gate.weight.T + m.gate.bias) / math.exp(m.temperature)).softmax(-1)
        mixed = sum((g[..., i, None] * e for i, e in enumerate(made)), torch.zeros_like(made[0]))
    return mixed @ m.out.weight[0]


def test_a_bert_with_padding_is_the_equation() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    plain: Any = BertModel(BertConfig(**shape, num_attention_heads=2), add_pooling_layer=False).eval()
    randomise(plain.parameters(), 0.3)
    ids, seen = torch.arange(12).view(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    inputs = {"input_ids": ids, "attention_mask": seen}
    model: Any = gatecc.transform(plain, "attention-free", inputs, verify=False)
    assert model.state_dict().keys() == plain.state_dict().keys()

    def attend(old: Any, x: Tensor, _: Any) -> Tensor:
        q, k, v = (heads(p(x), 2) for p in (old.query, old.key, old.value))
        n = x.size(1)
        return merged(_weighted(q, k, v, torch.zeros(x.size(0), n, n), seen[: x.size(0), :n]))

    hand: Any = by_hand(plain, model, ["encoder.layer.0.attention.self"], attend)
    with torch.no_grad():
        for sizes in (ids, ids[:, :5]):
            mask = seen[:, : sizes.size(1)]
            got, wanted = (m(input_ids=sizes, attention_mask=mask).last_hidden_state for m in (model, hand))
            assert gap(got[mask.bool()], wanted[mask.bool()]) <= 1e-5
    reverted(model, plain, (ids,), {"attention_mask": seen})


class Router(nn.Module):
    """Self-attention over places x: (B, N, 8) whose distances are an input that it does not read yet."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, distance: Tensor, points: Tensor) -> Tensor:
        q, k, v = (heads(f(x), 2) for f in (self.q, self.k, self.v))
        return self.o(merged(F.scaled_dot_product_attention(q, k, v)))


def test_pairs_come_from_inputs_of_the_model() -> None:
    def inputs(batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(batch, tokens, 8), torch.rand(batch, tokens, tokens), torch.rand(batch, tokens, 2)

    torch.manual_seed(0)
    plain, given = Router(), inputs(2, 5)
    recipe = gatecc.recipe("attention-free", edges="distance", coordinates="points", width=6)
    model: Any = gatecc.transform(plain, recipe, given, verify=False)
    new = new_parameters(model, plain)
    randomise(new.values(), 0.7)

    def hand(x: Tensor, distance: Tensor, points: Tensor) -> Tensor:
        q, k, v = (heads(f(x), 2) for f in (plain.q, plain.k, plain.v))
        between = points[:, :, None] - points[:, None]
        bias = _bias(model.mixer.bias, [distance, torch.atan2(between[..., 1], between[..., 0])])
        return plain.o(merged(_weighted(q, k, v, bias, torch.ones(x.shape[:2]))))

    with torch.no_grad():
        for sample in (given, inputs(3, 4)):
            assert gap(model(*sample), hand(*sample)) <= 1e-5
    gradients(model, new, model(*given))


@pytest.mark.parametrize(
    ("shape", "edges", "why"),
    [("b n n", "duration", "no input 'duration'"), ("b n 8", "x", "no features"), ("b m n", "distance", "no features")],
)
def test_inputs_that_hold_no_pairs_are_refused(shape: str, edges: str, why: str) -> None:
    text = attention(inputs=f"%distance = input  # {shape}")
    with pytest.raises(SiteRefusedError, match=why):
        done(text, *gatecc.recipe("attention-free", edges=edges).rewrites)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_how_pairs_are_mixed(count: int) -> None:
    mixer: Any = AttentionFree(tuple("abc"[:count]), width=5, temperature=1.0).module(PLACE)
    randomise(mixer.parameters(), 0.7)
    q, k, v = torch.randn(3, 2, 2, 6, 4)
    pairs = list(torch.rand(count, 2, 6, 6))
    keep = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    bias = _bias(mixer.bias, pairs)
    assert torch.allclose(mixer(q, k, v, *pairs), _weighted(q, k, v, bias, torch.ones(2, 6)), atol=1e-5)
    got = mixer(q, k, v, *pairs, keep)
    assert torch.allclose(got, _weighted(q, k, v, bias, keep), atol=1e-5)
    got.square().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None, name
        assert float(p.grad.abs().max()) > 1e-6, name


def test_a_gate_of_one_reads_the_first_pairs_alone() -> None:
    mixer: Any = AttentionFree(("a", "b"), width=5).module(PLACE)
    randomise(mixer.parameters(), 0.7)
    one, two, other = torch.rand(3, 2, 6, 6)
    with torch.no_grad():
        mixer.bias.gate.weight.zero_()
        mixer.bias.gate.bias.fill_(50.0)
    assert torch.equal(mixer.bias(one, two), mixer.bias(one, other))
    assert not torch.allclose(mixer.bias(two, one), mixer.bias(other, one))


def test_a_constant_bias_tells_queries_apart_by_their_gate_alone() -> None:
    mixer: Any = AttentionFree(("a",), width=5).module(PLACE)
    q, k, v = torch.randn(3, 2, 2, 6, 4)
    same = mixer(q, k, v, torch.full((2, 6, 6), 0.3)) / torch.sigmoid(q)
    assert torch.allclose(same, same[:, :, :1].expand_as(same), atol=1e-6)
    assert torch.allclose(same * torch.sigmoid(q), AttentionFree().module(PLACE)(q, k, v), atol=1e-6)


def test_directions_are_those_from_one_place_to_another() -> None:
    points = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
    assert torch.allclose(angles(points)[0, 0], torch.tensor([0.0, math.pi, -math.pi / 2]))
    assert torch.allclose(angles(points)[0, :, 0], torch.tensor([0.0, 0.0, math.pi / 2]))


def test_a_learned_bias_of_scores_goes_with_them() -> None:
    text = attention(mask="%table", inputs="%table = mul.Tensor(@bias.table, 2.0)  # 3 3 | bias")
    text = text.replace("%x = input", "@bias.table  # 3 3\n    %x = input")
    result = done(text, *gatecc.recipe("attention-free").rewrites)
    assert "bias.table" not in {n.target for n in result.program.graph.nodes}
    v = result.values
    hand = _weighted(v["qh"], v["kr"], v["vr"], torch.zeros(2, 3, 3), torch.ones(2, 3))
    out = merged(hand) @ result.program.module.get_parameter("att.o.weight").T
    assert torch.allclose(result.run()[0], out, atol=1e-5)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(SiteRefusedError, match="attention_free cannot take the place"):
        done(attention(causal=True), *gatecc.recipe("attention-free").rewrites)
    with pytest.raises(ArgumentError, match="by their own queries and keys"):
        AttentionFree().module(Place(dim=8, heads=2, kv_heads=2, key=4, value=3, scale=0.5, causal=False))
