"""HRPO on models of transformers: what the decoder thinks is the paper's equation, step by step, and is read again."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gatecc
from gatecc.errors import ArgumentError, DecoderError, SiteRefusedError
from gatecc.train import Thinking, rollout

END = 11


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, initializer_range=0.4, **shape))


def gpt2() -> Any:
    """Learned positions, and one table for embedding and head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.4)
    )


@pytest.fixture(scope="module", params=[llama, gpt2])
def thinking(request: Any) -> tuple[Any, Any, Any]:
    """The plain model, the thinking one with gates at random places, and its decoder."""
    torch.manual_seed(0)
    plain = request.param().eval()
    ids = torch.randint(0, 40, (3, 7))
    model: Any = gatecc.transform(
        Thinking(copy.deepcopy(plain)), gatecc.recipe("hrpo", until=(END,)), (ids, torch.zeros(3, 7, 16))
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".thinking." in name:
                p.add_(torch.randn(p.shape) * 0.5)
    return plain, model, gatecc.decoder(model, (ids, torch.zeros(3, 7, 16)))


def equation(model: Any, e: Tensor, s: Tensor) -> Tensor:
    """The paper's, with the weights of the model."""
    p = {n.rsplit("thinking.", 1)[1]: x for n, x in model.named_parameters() if "thinking." in n}
    r, i = (
        torch.sigmoid(e @ p["keep.weight"].T + p["keep.bias"]),
        torch.sigmoid(e @ p["take.weight"].T + p["take.bias"]),
    )
    a = torch.exp(-8 * F.softplus(-p["decay"]) * r)
    return a * e + torch.sqrt(1 - a**2 + 1e-8) * (i * s)


@torch.no_grad()
def reference(plain: Any, model: Any, prompt: Tensor, new: int) -> Tensor:
    """One sample, by whole forwards of the original model on embeddings."""
    table, ids = plain.get_input_embeddings().weight, prompt.tolist()
    rows, ended = [table[t] for t in ids], False
    for _ in range(new):
        logits = plain(inputs_embeds=torch.stack(rows)[None]).logits[0, -1]
        p = logits.softmax(-1)
        ids.append(int(logits.argmax()))
        ended = ended or ids[-1] == END
        e = table[ids[-1]]
        rows.append(e if ended else equation(model, e, (p @ table) / p.norm()))
    return torch.tensor(ids)


def test_tokens_are_those_of_a_loop_in_python(thinking: Any) -> None:
    plain, model, decoder = thinking
    prompts = torch.randint(0, 40, (4, 5), generator=torch.Generator().manual_seed(1))
    found = decoder.generate(prompts, 12)
    expected = torch.stack([reference(plain, model, prompt, 12) for prompt in prompts])
    assert torch.equal(found, expected)
    silent = plain.generate(prompts, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert not torch.equal(found, silent)  # thoughts change what is said
    assert torch.equal(decoder.generate(prompts[:1], 12), expected[:1])  # batch 1


def test_a_rollout_is_read_again_in_one_forward_and_trains_the_gates(thinking: Any) -> None:
    _, model, decoder = thinking
    prompts = torch.randint(0, 40, (4, 5))
    drawn = rollout(decoder, prompts, 9, generator=torch.Generator().manual_seed(0), stop=(3,))
    logits = model(drawn.ids, drawn.soft)
    scores = logits[:, 4:-1].log_softmax(-1).gather(-1, drawn.ids[:, 5:, None])[..., 0]
    kept = drawn.log_probs != 0
    torch.testing.assert_close(scores[kept], drawn.log_probs[kept], atol=1e-4, rtol=0)
    assert not drawn.soft[:, :5].any()
    ended = (drawn.ids[:, 5:] == END).long().cumsum(1).bool()
    assert torch.equal(drawn.soft[:, 5:].any(-1), ~ended)
    (scores * torch.randn(4, 1))[kept].sum().backward()
    gates = {n: p.grad for n, p in model.named_parameters() if ".thinking." in n}
    assert len(gates) == 5
    assert all(g is not None and bool(g.isfinite().all()) and float(g.abs().sum()) > 0 for g in gates.values())
    again = decoder.prefill(drawn.ids, soft=drawn.soft)[0]  # given thoughts are read in the place of its own
    torch.testing.assert_close(again, logits.detach(), atol=1e-4, rtol=0)


@torch.no_grad()
def test_without_thoughts_it_is_the_original_and_a_decay_of_1_nearly(thinking: Any) -> None:
    plain, model, decoder = thinking
    ids = torch.randint(0, 40, (2, 6))
    assert torch.equal(model(ids, torch.zeros(2, 6, 16)), plain(ids).logits)
    soft = torch.randn(2, 6, 16)
    decay = next(p for n, p in model.named_parameters() if n.endswith("thinking.decay"))
    before = decay.clone()
    decay.fill_(60.0)
    assert float((model(ids, soft) - plain(ids).logits).abs().max()) < 1e-2  # sqrt(1e-8) of what was thought
    decay.copy_(before)
    _, state = decoder.prefill(ids)
    turned = decoder.memory.reordered(state, torch.tensor([1, 0]))
    one, other = decoder.step(ids[:, 0], state)[0], decoder.step(ids[[1, 0], 0], turned)[0]
    torch.testing.assert_close(one, other[[1, 0]])


def test_what_cannot_be_is_refused(thinking: Any) -> None:
    decoder, ids = thinking[2], torch.randint(0, 40, (2, 6))
    with pytest.raises(ArgumentError, match="belong to the tokens"):
        decoder.prefill(ids, soft=torch.zeros(2, 3, 16))
    with pytest.raises(DecoderError, match="carries more than keys and values"):
        decoder.closed(16)


def test_models_without_room_for_thoughts_are_refused() -> None:
    ids = torch.randint(0, 40, (2, 6))
    with pytest.raises(SiteRefusedError, match="Thinking"):
        gatecc.transform(Thinking(llama()), "hrpo", (ids, torch.zeros(2, 6, 8)))
    with pytest.raises(ArgumentError, match="0 < low"):
        gatecc.recipe("hrpo", start=(0.0, 0.5))
    with pytest.raises(ArgumentError, match="embedding"):
        gatecc.recipe("hrpo", sites="mlp[0]")
    silent: Any = SimpleNamespace(prefill=lambda ids: (torch.zeros(2, 6, 40), {}), thoughts=lambda ids, state: [])
    with pytest.raises(ArgumentError, match="carries no thoughts"):
        rollout(silent, ids, 2)
