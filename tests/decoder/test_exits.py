"""A decoder whose tokens leave early, against the rule by hand: the models' own modules and a cache in Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from gatecc.capture.flops import counted
from gatecc.errors import SiteRefusedError
from gatecc.passes.exit.exit import Exit
from gatecc.train import exit_logits, exits, fit_exits

VOCAB, WIDTH, LAYERS, HEADS, NEW = 32, 16, 4, 4, 10
AT = (0, 2)  # blocks with an exit


class Rule:
    """One sample, token by token: where it left, a token's keys and values are made of its hidden state there."""

    def __init__(self, model: Any, thresholds: list[float], start: int = 0) -> None:
        self.model = model
        self.thresholds: dict[int, float] = dict(zip(AT, thresholds, strict=True))
        self.keys: list[list[Tensor]] = [[] for _ in range(LAYERS)]
        self.values: list[list[Tensor]] = [[] for _ in range(LAYERS)]
        self.depths: list[int] = []
        self.position = start

    def step(self, token: Tensor) -> Tensor:
        """token: () -> logits (V,)"""
        x, left, logits = self.embed(token), False, torch.empty(0)
        for i in range(LAYERS):
            q, k, v = self.projections(i, x)
            self.keys[i].append(k)
            self.values[i].append(v)
            if left:
                continue
            keys, values = torch.stack(self.keys[i], 1), torch.stack(self.values[i], 1)  # (G, N, D)
            groups = HEADS // keys.size(0)
            keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
            weights = (keys @ q.unsqueeze(-1) / q.size(-1) ** 0.5).softmax(1)
            x = self.finish(i, x, (weights * values).sum(1).flatten())
            if i in self.thresholds or i == LAYERS - 1:
                logits = self.head(x)
                left = float(logits.softmax(-1).max()) >= self.thresholds.get(i, 9.0)
                if left or i == LAYERS - 1:
                    self.depths.append(i + 1)
        self.position += 1
        return logits

    def generate(self, ids: Tensor, new: int) -> Tensor:
        logits = torch.empty(0)
        for token in ids:
            logits = self.step(token)
        for _ in range(new):
            ids = torch.cat([ids, logits.argmax()[None]])
            logits = self.step(ids[-1])
        return ids

    def embed(self, token: Tensor) -> Tensor:
        raise NotImplementedError

    def projections(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def finish(self, i: int, x: Tensor, heads: Tensor) -> Tensor:
        raise NotImplementedError

    def head(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class LlamaRule(Rule):
    def embed(self, token: Tensor) -> Tensor:
        return self.model.model.embed_tokens(token)

    def projections(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        layer = self.model.model.layers[i]
        x = layer.input_layernorm(x)
        linears = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        q, k, v = (linear(x).view(1, -1, 1, WIDTH // HEADS) for linear in linears)
        cos, sin = self.model.model.rotary_emb(x, torch.tensor([[self.position]]))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q[0, :, 0], k[0, :, 0], v[0, :, 0]

    def finish(self, i: int, x: Tensor, heads: Tensor) -> Tensor:
        layer = self.model.model.layers[i]
        x = x + layer.self_attn.o_proj(heads)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def head(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(x))


class Gpt2Rule(Rule):
    def embed(self, token: Tensor) -> Tensor:
        return self.model.transformer.wte(token) + self.model.transformer.wpe(torch.tensor(self.position))

    def projections(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = self.model.transformer.h[i]
        q, k, v = (part.view(HEADS, -1) for part in block.attn.c_attn(block.ln_1(x)).chunk(3))
        return q, k, v

    def finish(self, i: int, x: Tensor, heads: Tensor) -> Tensor:
        block = self.model.transformer.h[i]
        x = x + block.attn.c_proj(heads)
        return x + block.mlp(block.ln_2(x))

    def head(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.model.transformer.ln_f(x))


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": LAYERS}
    shape |= {"num_attention_heads": HEADS, "num_key_value_heads": 2, "vocab_size": VOCAB, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: dict[str, Any] = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
    shape |= {"vocab_size": VOCAB, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**shape)).eval()


class Made:
    """A model with exits, thresholds at which a part of the tokens leaves at each, and its decoder with padding."""

    def __init__(self, make: Any, rule: type[Rule]) -> None:
        torch.manual_seed(0)
        self.plain, self.rule = make(), rule
        self.ids = torch.randint(1, VOCAB, (3, 11))
        self.mask = torch.ones_like(self.ids)
        self.mask[0, :4] = self.mask[2, :2] = 0
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.call = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        self.call |= {"use_cache": False}
        self.model: Any = gatecc.transform(self.plain, Exit(f"block{list(AT)}", "tail(shared=True)"), self.call)
        for exit_, z in zip(exits(self.model), exit_logits(self.model, self.call), strict=False):
            exit_.threshold.fill_(float(exit_.score(z.detach()).flatten().quantile(0.6)))
        self.decoder = gatecc.decoder(self.model, self.call)

    def expected(self, row: int, new: int) -> tuple[Tensor, Rule]:
        by_hand = self.rule(self.plain, [float(e.threshold) for e in exits(self.model)])
        return by_hand.generate(self.ids[row][self.mask[row].bool()], new), by_hand


@pytest.fixture(scope="module", params=[(llama, LlamaRule), (gpt2, Gpt2Rule)], ids=["llama", "gpt2"])
def made(request: Any) -> Made:
    return Made(*request.param)


@torch.no_grad()
def test_tokens_are_those_of_the_rule(made: Made) -> None:
    """A batch with padding on the left, each sample by itself, and generate of transformers; some leave everywhere."""
    text = made.decoder.generate(made.ids, NEW, attention_mask=made.mask)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(made.model.generate(made.ids, attention_mask=made.mask, **options), text)
    depths = set[int]()
    for row in range(3):
        expected, by_hand = made.expected(row, NEW)
        depths |= set(by_hand.depths[-NEW:])
        own = made.ids[row][made.mask[row].bool()]
        assert torch.equal(text[row, -len(expected) :], expected)
        assert torch.equal(made.decoder.generate(own[None], NEW)[0], expected)
    assert depths == {1, 3, 4}


@torch.no_grad()
def test_steps_prefill_and_forward_agree_and_never_is_the_model(made: Made) -> None:
    ids, state, parts = made.ids[1:], None, list[Tensor]()
    for piece in (4, 1, 1, 1, 3, 1):
        start = sum(p.size(1) for p in parts)
        logits, state = made.decoder.prefill(ids[:, start : start + piece], state)
        parts.append(logits)
    stepped = torch.cat(parts, 1)
    mask = torch.ones_like(ids)
    whole = made.model(ids, attention_mask=mask, use_cache=False).logits
    by_hand = made.rule(made.plain, [float(e.threshold) for e in exits(made.model)])
    assert torch.allclose(stepped[0], torch.stack([by_hand.step(token) for token in ids[0]]), atol=1e-4)
    assert torch.allclose(stepped, whole, atol=1e-4)
    plain = made.plain(ids, attention_mask=mask, use_cache=False).logits
    assert not torch.allclose(whole, plain, atol=1e-2)
    before = [float(e.threshold) for e in exits(made.model)]
    try:
        for exit_ in exits(made.model):
            exit_.threshold.fill_(1.5)
        assert torch.equal(made.model(ids, attention_mask=mask, use_cache=False).logits, plain)
        base = made.plain.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(made.decoder.generate(ids, NEW), base)
    finally:
        for exit_, value in zip(exits(made.model), before, strict=True):
            exit_.threshold.fill_(value)


@torch.no_grad()
def test_who_left_costs_keys_and_values(made: Made) -> None:
    """FLOPs of a step: of a skipped layer the projections to keys and values, where one matrix yields queries as well
    these too."""
    by_hand = made.rule(made.plain, [float(e.threshold) for e in exits(made.model)])
    state, spent = made.decoder.init_state(1), list[int]()
    for token in made.ids[1]:
        (_, state), flops = counted(lambda t=token, s=state: made.decoder.step(t[None], s))
        by_hand.step(token)
        spent.append(flops)
    kv = 3 * WIDTH * WIDTH if made.rule is Gpt2Rule else 2 * WIDTH * WIDTH // 2
    own = (4 * WIDTH * WIDTH + 2 * 4 * WIDTH * WIDTH) if made.rule is Gpt2Rule else (3 * WIDTH + 3 * 32) * WIDTH
    heads = {1: 1, 3: 2, 4: 3}
    for t, (flops, depth) in enumerate(zip(spent, by_hand.depths, strict=True)):
        attention = 2 * WIDTH * (t + 1)
        layers = depth * (own + attention) + (LAYERS - depth) * kv
        rotary = flops % (2 * WIDTH) if made.rule is LlamaRule else 0  # the table's outer product
        assert flops - rotary == 2 * (layers + heads[depth] * WIDTH * VOCAB), (t, depth)
    assert len(set(by_hand.depths)) > 1


def test_heads_of_their_own_learn(tmp_path: Any) -> None:
    torch.manual_seed(0)
    plain = llama()
    ids = torch.randint(0, VOCAB, (4, 9))
    call = {"input_ids": ids, "use_cache": False}
    model: Any = gatecc.transform(plain, Exit("block[1]", "pooled(each)", "learned"), call)
    labels = torch.cat([ids[:, 1:], torch.full((4, 1), -100)], 1)
    fitted = fit_exits(model, [(call, labels)], steps=30, lr=1e-2)
    assert fitted.heads[-1][0] < 0.9 * fitted.heads[0][0]
    found = gatecc.train.calibrate(model, [(call, labels)], by="quantile", share=0.5)
    assert found.scores.shape == (32, 1)
    assert found.chosen.cost < 0.9
    made = gatecc.decoder(model, call)
    with torch.no_grad():
        assert torch.allclose(made.prefill(ids)[0], model(**call).logits, atol=1e-4)
    gatecc.save(model, tmp_path / "m")
    again: Any = gatecc.load(plain, tmp_path / "m")
    assert torch.equal(again(**call).logits, model(**call).logits)
    assert torch.equal(gatecc.revert(model)(**call).logits, plain(**call).logits)


def test_written_steps_skip_by_branches(tmp_path: Any) -> None:
    """decode.onnx is compared with torch at batch 1 and 3 before it is written; in a branch are q, o and the MLP."""
    pytest.importorskip("onnxruntime")
    onnx: Any = pytest.importorskip("onnx")
    torch.manual_seed(0)
    call: dict[str, Any] = {"input_ids": torch.randint(0, VOCAB, (3, 9)), "use_cache": False}
    model: Any = gatecc.transform(llama(), Exit("block[1]", "tail(shared=True)"), call)
    early = exit_logits(model, call)[0]
    exits(model)[0].threshold.fill_(float(early.detach().softmax(-1).amax(-1).median()))
    written = gatecc.export(model, tmp_path / "m", call, decode=True)
    assert written.decode is not None
    assert {c.sizes["batch"] for c in written.decode.compared} == {1, 3}
    graph = onnx.load(tmp_path / "m" / "decode.onnx").graph
    bodies = [a.g for n in graph.node if n.op_type == "If" for a in n.attribute if a.name == "then_branch"]
    assert sorted(sum(n.op_type == "MatMul" for n in body.node) for body in bodies) == [
        1,
        5,
    ]  # the last block is in the head's


def test_refused_by_name() -> None:
    from transformers import BertConfig, BertForMaskedLM

    plain = llama()
    call: dict[str, Any] = {"input_ids": torch.randint(0, VOCAB, (2, 9)), "use_cache": False}
    with pytest.raises(SiteRefusedError, match=r"pooled\(pool=each\)"):
        gatecc.transform(plain, Exit("block[0]"), call)
    with pytest.raises(SiteRefusedError, match="from the first block to the last"):
        gatecc.transform(plain, [Exit("block[2]", "tail"), Exit("block[0]", "tail")], call)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}
    bert = BertForMaskedLM(BertConfig(intermediate_size=32, **shape)).eval()
    with pytest.raises(SiteRefusedError, match="no token sees a later one"):
        gatecc.transform(bert, Exit("block[0]", "tail"), {"input_ids": call["input_ids"]})
