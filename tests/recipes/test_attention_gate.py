"""Attention-Gate: flags evict keys; masked with gradients, gone from the decoder's cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from gatecc.errors import ArgumentError, DecoderError, SiteRefusedError
from gatecc.passes.attention_edit.attention_edit import AttentionEdit
from gatecc.passes.attention_edit.evict import Evict
from gatecc.train import Tune, heal, routing
from tests.graphs import attention, done
from tests.recipes.checks import case, new_parameters, randomise, reverted

NEW = 12


def llama(implementation: str = "sdpa", **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": implementation}
    return LlamaForCausalLM(LlamaConfig(**shape, **options)).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
    shape |= {"attn_pdrop": 0.0, "attn_implementation": "eager"}
    return GPT2LMHeadModel(GPT2Config(**shape)).eval()


def test_the_equation() -> None:
    result = done(attention(True), AttentionEdit("attention[...]", Evict(bias=0.1), label="gate"))
    module, v = result.program.module, result.values
    gate: Any = module.get_submodule("att.gate")
    randomise([gate.weight])
    flags = torch.sigmoid(v["x"] @ gate.weight.T + gate.bias) > 0.5  # (B, N, 2): per key head
    n = flags.shape[1]
    seen = torch.ones(n, n).tril(-1).bool() & flags.mT.unsqueeze(2) | torch.eye(n).bool()
    seen = seen.repeat_interleave(2, 1)
    heads = (v["qh"] @ v["kr"].mT / 2**0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v["vr"]
    expected = heads.transpose(1, 2).flatten(2) @ module.get_parameter("att.o.weight").T
    assert 0.1 < float(flags.float().mean()) < 0.9
    assert torch.allclose(result.run()[0], expected, atol=1e-5)


@pytest.mark.parametrize(("make", "budget", "recent"), [(llama, 0, 0), (gpt2, 7, 4)])
def test_the_decoder_is_the_rule(make: Any, budget: int, recent: int) -> None:
    """Tokens and logits of steps are those of forwards over everything, in which flags are applied by a mask."""
    plain = make()
    ids = torch.randint(0, 32, (2, 17))
    call = {"input_ids": ids, "use_cache": False}
    model: Any = gatecc.transform(plain, gatecc.recipe("attention-gate", budget=budget, recent=recent), call)
    randomise(new_parameters(model, plain).values())
    made = gatecc.decoder(model, call)
    text = ids
    masked: list[Tensor] = []
    for _ in range(NEW):
        logits = model(input_ids=text, use_cache=False).logits  # with gradients: every key is computed, and masked
        masked.append(logits[:, -1].detach())
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made.generate(ids, NEW), text)
    stepped, state = made.prefill(ids)
    found = [stepped[:, -1]]
    for token in text[:, 17:-1].unbind(1):
        stepped, state = made.step(token, state)
        found.append(stepped)
    assert torch.allclose(torch.stack(found), torch.stack(masked), atol=1e-5)
    with torch.no_grad():
        skipped = model(input_ids=text, use_cache=False).logits
        dense = plain(input_ids=text, use_cache=False).logits
    assert torch.allclose(skipped[:, -2], masked[-1], atol=1e-5)
    assert not torch.allclose(skipped, dense, atol=1e-3)
    places = [x for x in state["slots"] if x.dtype == torch.int64]
    tokens = text.shape[1] - 1
    held = torch.stack([x[:, :, :2, 1] for x in places])  # layers, samples, heads, classes
    assert int(held.sum(-1).max()) <= (budget or tokens)
    assert budget or 0.05 * tokens < float(held.float().sum(-1).mean()) < 0.95 * tokens
    assert int(held.sum(-1).min()) >= recent
    assert all(slot.kind == "state" for slot in made.plan.slots)  # no other slot grows with the tokens
    branch, _ = made.step(text[:, 0], state)  # what is stepped twice from one state sees the same
    again, _ = made.step(text[:, 1], state)
    assert torch.equal(made.step(text[:, 0], state)[0], branch)
    assert not torch.equal(again, branch)


def test_padding_is_held_by_nobody() -> None:
    plain = llama("eager")
    ids = torch.randint(1, 32, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    call = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    model: Any = gatecc.transform(plain, "attention-gate", call)  # the identity, padding included
    randomise(new_parameters(model, plain).values())
    masked = model(**call).logits
    with torch.no_grad():
        skipped = model(**call).logits
        alone = model(input_ids=ids[:1, 4:], use_cache=False).logits
    assert torch.allclose(masked, skipped, atol=1e-5)
    assert torch.allclose(alone[0], skipped[0, 4:], atol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 3):  # beams take the caches of one another
        both = model.generate(ids, attention_mask=mask, num_beams=beams, **options)
        single = model.generate(ids[:1, 4:], num_beams=beams, **options)
        assert torch.equal(both[0, 11:], single[0, 7:])
    assert torch.equal(both[:1, 4:], best(model, ids[:1, 4:], 4, 3))
    reverted(model, plain, (), call)


@torch.no_grad()
def best(model: Any, ids: Tensor, new: int, beams: int) -> Tensor:
    """A beam search by forwards over everything."""
    texts, scores = ids, torch.zeros(1)
    for _ in range(new):
        logits = model(input_ids=texts, use_cache=False).logits[:, -1].log_softmax(-1)
        scores, at = (scores[:, None] + logits).flatten().topk(beams)
        texts = torch.cat([texts[at // logits.size(1)], at[:, None] % logits.size(1)], 1)
    return texts[:1]


def test_gates_learn_the_rate_and_what_matters() -> None:
    """With the base frozen the share of kept tokens goes to the target, and nothing but gates moves."""
    plain = llama()
    ids = torch.randint(0, 32, (4, 16))
    call = {"input_ids": ids, "use_cache": False}
    model: Any = gatecc.transform(plain, gatecc.recipe("attention-gate", target=0.5, weight=4.0, bias=0.5), call)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    routing.step(model)
    assert torch.allclose(model.train()(**call).logits, plain.train()(**call).logits, atol=1e-6)
    losses = [float(loss["rate"]) for loss in gatecc.aux_losses(model).values()]
    assert losses == [4.0 * 0.25] * 2  # 4 (1 - 1/2)^2
    stage = Tune(40, lr=3e-2, train=("*.gate.*",), loss=lambda out, batch: out.logits.square().mean())
    heal(model, None, [call], tune=stage, progress=False)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(new_parameters(model, plain))
    rows = gatecc.cost(model.eval(), call, rounds=0).taken
    kept = [sum(row.counts) / (row.of * len(row.counts)) for row in rows if row.kind == "kept token"]
    assert len(kept) == 2
    assert all(0.3 < share < 0.7 for share in kept)


def test_what_does_not_fit() -> None:
    with pytest.raises(ArgumentError, match="target is out of range"):
        Evict(target=1.5)
    with pytest.raises(ArgumentError, match="bias is out of range"):
        Evict(bias=0.0)
    with pytest.raises(ArgumentError, match=r"(?s)recent is out of range.*budget of 3"):
        Evict(budget=3, recent=4)
    vit = case("timm/vit-sdpa")
    with pytest.raises(SiteRefusedError, match="a budget, and a mask that is not plainly causal"):
        gatecc.transform(vit.model, gatecc.recipe("attention-gate", budget=3), vit.inputs)
    with pytest.raises(SiteRefusedError, match="stay for being recent, where no token comes before another"):
        gatecc.transform(vit.model, gatecc.recipe("attention-gate", recent=3), vit.inputs)
    both: Any = gatecc.transform(vit.model, "attention-gate", vit.inputs)  # hidden from all others, in both directions
    randomise(new_parameters(both, vit.model).values())
    with torch.no_grad():
        skipped = both(*vit.args)
    assert torch.allclose(both(*vit.args), skipped, atol=1e-5)
    from transformers import MistralConfig, MistralForCausalLM

    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4}
    call = {"input_ids": torch.randint(0, 32, (1, 9)), "use_cache": False}
    model = gatecc.transform(MistralForCausalLM(MistralConfig(**shape)).eval(), "attention-gate", call)
    with pytest.raises(DecoderError, match="eviction from attention with a sliding window"):
        gatecc.decoder(model, call)
