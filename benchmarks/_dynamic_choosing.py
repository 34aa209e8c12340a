"""Section of dynamic.py: a decoder whose tokens read an eighth of the blocks of keys, against the dense one at 4096."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf
from _table import Row, best_of

import gatecc

CONTEXT, PIECE, VOCAB, SHARE, ROOM = 4096, 512, 1000, 1 / 8, 128


def choosing() -> Iterator[Row]:
    """SeerAttention's gates of random weights, one question for each token; everything kept as well."""
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=2 * CONTEXT,
    )
    plain: Any = hf.LlamaForCausalLM(config).eval()
    ids = torch.randint(VOCAB, (1, CONTEXT))
    call = {"input_ids": ids[:, :16], "use_cache": False}
    recipe = gatecc.recipe("seer-attention", share=SHARE, pool_queries=False)
    chosen: Any = gatecc.transform(plain, recipe, call)
    decoders = [gatecc.decoder(m, call, capacity=CONTEXT + ROOM) for m in (plain, chosen)]
    states: list[Any] = []
    for made in decoders:
        state = made.init_state(1)
        for piece in ids.split(PIECE, 1):
            _, state = made.prefill(piece, state)
        states.append(state)
    token, cuts = ids[:, 0], [b for n, b in chosen.named_buffers() if n.endswith("gate.cut")]

    def step(share: float, which: int = 1) -> None:
        """The next token each time: a state that is stepped twice is copied."""
        for cut in cuts:
            cut.fill_(share)
        _, states[which] = decoders[which].step(token, states[which])

    step(SHARE)
    step(SHARE, 0)
    seconds = best_of(lambda: step(SHARE, 0), lambda: step(SHARE), lambda: step(1.0), repeats=12)
    held = [made.memory.bytes(state) for made, state in zip(decoders, states, strict=True)]
    what = f"llama 6 x 512, {CONTEXT} tokens read in blocks of 64, batch 1"
    yield Row(f"{what}: a step that reads 1/8 of the blocks", seconds[1] / seconds[0], 1.0, unit="x dense")
    yield Row("  that reads all", seconds[2] / seconds[0], unit="x dense")
    yield Row("  a dense step", 1e3 * seconds[0], unit="ms")
    yield Row("  cache memory, features of blocks included", held[1] / held[0], unit="x dense")
    part = ids[:, :600]
    for cut in cuts:
        cut.fill_(SHARE)
    _, state = decoders[1].prefill(part[:, :-1])
    got, _ = decoders[1].step(part[:, -1], state)
    with torch.no_grad():
        whole = chosen(part, use_cache=False).logits[:, -1]
    yield Row("  logits of a step against the full forward", float((got - whole).abs().max()), 1e-4)
