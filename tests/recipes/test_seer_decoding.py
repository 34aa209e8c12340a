"""SeerAttention as it decodes: each token chooses blocks, and a step reads the keys of those alone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from gatecc.errors import SiteRefusedError
from gatecc.ops import registry
from gatecc.ops.chosen_blocks import cache
from gatecc.train import Tune, heal
from tests.recipes.checks import case, new_parameters, randomise, reverted
from tests.recipes.test_attention_gate import gpt2, llama

BLOCK = 3


def turned(x: Tensor, place: int) -> Tensor:
    """The rotary embedding as a product of complex numbers. x: (R,)"""
    half = len(x) // 2
    z = torch.complex(x[:half], x[half:]) * torch.exp(1j * place * 10_000.0 ** (-torch.arange(half) / half))
    return torch.cat([z.real, z.imag])


def test_the_equation() -> None:
    """One token after the other, in Python."""
    torch.manual_seed(0)
    B, H, K, N, D, R = 2, 4, 2, 11, 4, 6
    q, q_raw = torch.randn(2, B, H, N, D)
    k, k_raw, value = torch.randn(3, B, K, N, D)
    query, key = torch.randn(K, D, R), torch.randn(K, 3 * D, R)
    expected, scored, counts = torch.zeros_like(q), set[int](), [0, 0]
    for b, h, t in itertools.product(range(B), range(H), range(N)):
        g, own = h // 2, t // BLOCK
        asked = turned(q_raw[b, 2 * g : 2 * g + 2, t].mean(0) @ query[g], own * BLOCK)
        scores = dict[int, float]()
        for j in range(own):
            keys = k_raw[b, g, j * BLOCK : (j + 1) * BLOCK]
            pools = torch.cat([keys.mean(0), keys.amax(0), keys.amin(0)])
            scores[j] = float(asked @ turned(pools @ key[g], j * BLOCK))
        chosen = {own, 0}
        for j in sorted(scores, key=lambda j, scores=scores: -scores[j]):
            if len(chosen) < math.ceil(0.75 * (own + 1)):
                chosen.add(j)
        scored |= chosen if own == 3 else set()
        counts[g] += len(chosen) * (h == 2 * g)
        seen = [i for i in range(t + 1) if i // BLOCK in chosen]
        expected[b, h, t] = (k[b, g, seen] @ q[b, h, t] / 2).softmax(0) @ value[b, g, seen]
    assert scored == {0, 1, 2, 3}  # of the two in the middle now one is chosen, now the other
    cut = torch.tensor(0.75)
    options: dict[str, Any] = {"block": BLOCK, "scale": 0.5, "base": 10_000.0}
    operator, tensors = torch.ops.gatecc.chosen_blocks.default, (q, k, value, q_raw, k_raw, query, key, cut)
    found = operator(*tensors, **options)[0]
    assert torch.allclose(found, expected, atol=1e-5)
    taken: Any = registry.find(operator)
    taken = taken.taken(*tensors, out=found, **options)
    assert taken.counts == counts
    assert taken.of == B * sum(t // BLOCK + 1 for t in range(N))


@pytest.mark.parametrize(("make", "options"), [(llama, {"share": 0.4}), (gpt2, {"threshold": 0.3})])
@torch.no_grad()
def test_steps_are_the_forward_and_all_kept_is_dense(make: Any, options: dict[str, Any]) -> None:
    plain = make()
    ids = torch.randint(1, 32, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    call = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    recipe = gatecc.recipe("seer-attention", block=BLOCK, width=4, pool_queries=False, **options)
    model: Any = gatecc.transform(plain, recipe, call)
    randomise(new_parameters(model, plain).values())
    whole = model(**call).logits
    dense = plain(**call).logits
    here = mask.bool()
    assert not torch.allclose(whole[here], dense[here], atol=1e-3)
    made = gatecc.decoder(model, call)
    counts = list[int]()
    gathered = cache._gathered

    def counting(q: Tensor, keys: Tensor, *rest: Any) -> Tensor:
        counts.append(int(rest[2].sum()))  # the chosen blocks
        return gathered(q, keys, *rest)

    cache._gathered, before = counting, gathered
    try:
        for pieces in ([1] * 20, [7, 1, 1, 1, 6, 1, 1, 1, 1]):
            state, parts, start = made.init_state(3), list[Tensor](), 0
            for piece in pieces:
                part = slice(start, start + piece)
                given = {"attention_mask": mask[:, part], "position_ids": positions[:, part]}
                logits, state = made.prefill(ids[:, part], state, **given)
                parts.append(logits)
                start += piece
            assert torch.allclose(torch.cat(parts, 1)[here], whole[here], atol=1e-5)
    finally:
        cache._gathered = before
    heads = 2 if make is llama else 4
    assert counts[0] == 3 * heads
    assert max(counts) < 3 * heads * 7  # there are seven blocks in the end
    branch = made.step(ids[:, 0], state)[0]  # what is stepped twice from one state sees the same
    assert not torch.equal(made.step(ids[:, 1], state)[0], branch)
    assert torch.equal(made.step(ids[:, 0], state)[0], branch)
    alone = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = model.generate(ids[1:2], attention_mask=mask[1:2], **alone)
    slow = ids[1:2]
    for _ in range(6):
        ones = torch.ones_like(slow)
        at = (ones.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=slow, attention_mask=ones, position_ids=at, use_cache=False).logits
        slow = torch.cat([slow, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, slow)
    for name, buffer in model.named_buffers():
        if name.endswith("gate.cut"):
            buffer.fill_(1.0 if "share" in options else -1.0)
    assert torch.allclose(model(**call).logits[here], dense[here], atol=1e-5)
    base = plain.generate(ids, attention_mask=mask, **alone)
    assert torch.equal(model.generate(ids, attention_mask=mask, **alone), base)
    reverted(model, plain, (), call)


def test_gates_learn_where_attention_looks() -> None:
    """With the base frozen the loss falls, and nothing but gates moves; padding asks for nothing."""
    plain = llama()
    ids = torch.randint(1, 32, (4, 24))
    call = {"input_ids": ids, "use_cache": False}
    recipe = gatecc.recipe("seer-attention", block=BLOCK, width=8, share=0.5, pool_queries=False)
    model: Any = gatecc.transform(plain, recipe, call)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert torch.allclose(model.train()(**call).logits, plain.train()(**call).logits, atol=1e-6)
    first = [float(loss["blocks"]) for loss in gatecc.aux_losses(model).values()]
    heal(model, None, [call], tune=Tune(40, lr=3e-2, train=("*gate.*",)), progress=False)
    model.train()(**call)
    last = [float(loss["blocks"]) for loss in gatecc.aux_losses(model).values()]
    assert len(first) == 2
    assert sum(last) < 0.7 * sum(first)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(new_parameters(model, plain))
    with torch.no_grad():
        whole = model.eval()(**call).logits
        made = gatecc.decoder(model, call)
        state, parts = made.init_state(4), list[Tensor]()
        for token in ids.unbind(1):
            logits, state = made.step(token, state)
            parts.append(logits)
        assert torch.allclose(torch.stack(parts, 1), whole, atol=1e-5)  # without a mask nothing is masked in a step


def test_what_does_not_fit() -> None:
    vit = case("timm/vit-sdpa")
    with pytest.raises(SiteRefusedError, match="causal attention"):
        gatecc.transform(vit.model, gatecc.recipe("seer-attention", pool_queries=False), vit.inputs)
