"""The eager forward of a transformed model against the same gates written by hand in Python.

``python benchmarks/gate_overhead.py [--check]``. Llama, hidden 512, 6 layers, 128 tokens, identity head gates after
attention. By hand: the gate is applied where a person would put it, in a subclass of the attention function. Padded: 4
rows of 256 tokens, half of them padded; converted layers are given their mask and assert its form, one graph proves it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf
from _table import Row, best_of, main
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import gatecc

LIMIT = 1.10
ONE_TOKEN = 1.12  # the look for a variant weighs most where a call does least
HIDDEN, HEADS, DEPTH, TOKENS = 512, 8, 6, 128


def by_hand(model: nn.Module) -> nn.Module:
    """The model with a head gate 2*sigmoid(Wx+b) after each attention, through transformers' attention interface."""
    gated: Any = copy.deepcopy(model)

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        out, weights = sdpa_attention_forward(module, query, key, value, mask, **options)
        return out * (2 * torch.sigmoid(module.gate(module.gate_input))).unsqueeze(-1), weights

    AttentionInterface.register("gated", attention)
    AttentionMaskInterface.register("gated", sdpa_mask)
    for layer in gated.model.layers:
        layer.self_attn.gate = nn.Linear(HIDDEN, HEADS)
        nn.init.zeros_(layer.self_attn.gate.weight)
        nn.init.zeros_(layer.self_attn.gate.bias)
        layer.self_attn.register_forward_pre_hook(_keep_input, with_kwargs=True)
    gated.set_attn_implementation("gated")
    return gated


def _keep_input(module: Any, args: Any, kwargs: Any) -> None:
    module.gate_input = args[0] if args else kwargs["hidden_states"]


def measure() -> Iterator[Row]:
    """The rows of the benchmark."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=1000,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        use_cache=False,
    )
    model = hf.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 1000, (1, TOKENS))
    hand = by_hand(model)
    gated = gatecc.transform(model, "gated-attention", (ids,))
    with torch.no_grad():
        assert torch.allclose(hand(ids).logits, gated(ids).logits, atol=1e-4)
        plain_s, hand_s, gated_s = best_of(*(lambda m=m: m(ids) for m in (model, hand, gated)), repeats=30)
    yield Row("gatecc / by hand", gated_s / hand_s, LIMIT)
    yield Row("by hand / no gate", hand_s / plain_s)
    yield Row("gatecc", 1e3 * gated_s, unit="ms CPU")
    small = torch.randint(0, 1000, (1, 1))
    with torch.no_grad():
        hand_s, gated_s = best_of(lambda: hand(small), lambda: gated(small), repeats=30)
    yield Row("one token: gatecc / by hand", gated_s / hand_s, ONE_TOKEN)
    yield from padded(model, hand, gated)


def padded(model: nn.Module, hand: nn.Module, gated: nn.Module) -> Iterator[Row]:
    """Padded calls, of the gated model and of a converted one."""
    ids = torch.randint(0, 1000, (4, 2 * TOKENS))
    mask = torch.ones_like(ids)
    mask[:2, TOKENS:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    layers, whole = (gatecc.transform(model, "gla", inputs, scope=scope) for scope in ("auto", "model"))
    whole.load_state_dict(layers.state_dict())
    with torch.no_grad():
        kept = mask.bool()
        assert torch.allclose(hand(**inputs).logits[kept], gated(**inputs).logits[kept], atol=1e-4)
        assert torch.allclose(layers(**inputs).logits[kept], whole(**inputs).logits[kept], atol=1e-4)
        models = (hand, gated, whole, layers)
        hand_s, gated_s, whole_s, layers_s = best_of(*(lambda m=m: m(**inputs) for m in models), repeats=10)
    yield Row("padded: gatecc / by hand", gated_s / hand_s)
    yield Row("padded, gla: masks handed down / one graph", layers_s / whole_s)


if __name__ == "__main__":
    main("gate_overhead", lambda: list(measure()))
