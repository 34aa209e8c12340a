"""Section of dynamic.py: steps of a decoder whose tokens leave at half of the depth, against the plain one's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf
from _table import Row, best_of, stepping

import gatecc
from gatecc.train import exits

CONTEXT, VOCAB, LAYERS, AT, ROOM = 512, 1000, 6, 2, 128


def decoding() -> Iterator[Row]:
    """llama 6 x 512 with the model's own head behind the third block; everybody leaves there, nobody, or one of two."""
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        max_position_embeddings=2 * CONTEXT,
    )
    plain: Any = hf.LlamaForCausalLM(config).eval()
    ids = torch.randint(VOCAB, (2, CONTEXT))
    call = {"input_ids": ids[:, :16], "use_cache": False}
    leaving = gatecc.transform(plain, gatecc.Exit(f"block[{AT}]", "tail(shared=True)"), call)
    dense, early = (gatecc.decoder(m, call, capacity=CONTEXT + ROOM) for m in (plain, leaving))
    rule = exits(leaving)[0]
    for batch in (1, 2):
        (_, one), (_, other) = dense.prefill(ids[:batch]), early.prefill(ids[:batch])
        token = ids[:batch, 0]
        full, leave = stepping(dense, token, one), stepping(early, token, other)

        def step(threshold: float, leave: Any = leave) -> Any:
            rule.threshold.fill_(threshold)
            return leave()

        between = float(rule.score(step(0.0)).sort().values.mean()) if batch == 2 else 2.0
        seconds = best_of(
            full,
            lambda step=step: step(0.0),
            lambda step=step: step(2.0),
            lambda step=step, between=between: step(between),
            repeats=30,
        )
        what = f"llama {LAYERS} x 512, {CONTEXT} tokens read, batch {batch}"
        bar = (LAYERS + AT + 1) / (2 * LAYERS)
        yield Row(
            f"{what}: a step in which all leave at half of the depth", seconds[1] / seconds[0], bar, unit="x plain"
        )
        yield Row("  in which nobody leaves (the exit's head is computed)", seconds[2] / seconds[0], unit="x plain")
        if batch == 2:
            yield Row("  in which one of the two leaves", seconds[3] / seconds[0], unit="x plain")
        yield Row("  a step of the plain decoder", 1e3 * seconds[0], unit="ms")
