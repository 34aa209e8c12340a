"""A decoder whose heads let half of the tokens go, against the dense one: memory and time of a step at 4096 tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf
from _table import Row, best_of, stepping
from torch import Tensor

import gatecc
from gatecc.decoder import Decoder

CONTEXT, PIECE, VOCAB, HEADS, ROOM = 4096, 512, 1000, 8, 16


def eviction() -> Iterator[Row]:
    """Gates of random weights keep half of the tokens, each head its own."""
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=HEADS,
        max_position_embeddings=2 * CONTEXT,
    )
    plain: Any = hf.LlamaForCausalLM(config).eval()
    ids = torch.randint(VOCAB, (1, CONTEXT))
    call = {"input_ids": ids[:, :16], "use_cache": False}
    gated = gatecc.transform(plain, "attention-gate", call)
    _halve(gated, plain, ids[:, :1024])
    whole = gatecc.transform(plain, "attention-gate", call)
    decoders = [gatecc.decoder(m, call, capacity=CONTEXT + ROOM) for m in (plain, gated, whole)]
    states = [_read(made, ids) for made in decoders]
    kept = _kept(states[1])
    held = [made.memory.bytes(state) for made, state in zip(decoders, states, strict=True)]
    steps = [stepping(made, ids[:, 0], state) for made, state in zip(decoders, states, strict=True)]
    seconds = best_of(*steps, repeats=ROOM - 4)
    what = f"llama 6 x 512, {CONTEXT} tokens read, batch 1"
    yield Row(f"{what}: share of the tokens that is kept", kept)
    yield Row("  cache memory, room to grow included", held[1] / held[0], 0.55, unit="x dense")
    yield Row("  time of a step", seconds[1] / seconds[0], 0.7, unit="x dense")
    yield Row("  everything kept: time of a step", seconds[2] / seconds[0], unit="x dense")
    yield Row("  a step", 1e3 * seconds[1], unit="ms")
    yield Row("  logits of a step against the full forward", _error(gated, decoders[1], ids), 1e-4)


@torch.no_grad()
def _halve(model: Any, plain: Any, ids: Tensor) -> None:
    """Let each head keep a token where a random direction says so, about half of them."""
    inputs = plain.model(ids, use_cache=False, output_hidden_states=True).hidden_states
    for layer, x in zip(model.model.layers, inputs, strict=False):
        gate: Any = layer.self_attn.gate
        gate.weight.normal_()
        gate.bias.copy_(-(layer.input_layernorm(x) @ gate.weight.T).flatten(0, 1).median(0).values)


def _read(made: Decoder, ids: Tensor) -> dict[str, Any]:
    state = made.init_state(1)
    for piece in ids.split(PIECE, 1):
        _, state = made.prefill(piece, state)
    return state


def _kept(state: dict[str, Any]) -> float:
    places = [x for x in state["slots"] if x.dtype == torch.int64]
    return sum(int(x[:, :, 0, 1].sum()) for x in places) / (len(places) * HEADS * CONTEXT)


@torch.no_grad()
def _error(model: Any, made: Decoder, ids: Tensor) -> float:
    part = ids[:, :600]
    state = _read(made, part[:, :-1])
    got, _ = made.step(part[:, -1], state)
    return float((got - model(part, use_cache=False).logits[:, -1]).abs().max())
