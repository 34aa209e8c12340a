"""The derived decoder against transformers' own generate with its KV cache: greedy tokens per second, batch 1.

``python benchmarks/decoder.py [--check]``. A tiny llama, where the time between operators counts, and one of 6 layers
and 512 features, where the weights do. Both decode the same text; the tokens are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf
from _table import Row, best_of, main
from torch import nn

import gatecc

VOCAB, PROMPT, NEW = 1000, 32, 64
SIZES = (("tiny", 64, 2, 1.5), ("6 x 512", 512, 6, 1.1))


def llama(hidden: int, depth: int) -> nn.Module:
    """A llama with random weights; no token ends its texts."""
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        eos_token_id=None,
        pad_token_id=0,
    )
    return hf.LlamaForCausalLM(config).eval()


def measure() -> Iterator[Row]:
    """The rows of the benchmark."""
    torch.manual_seed(0)
    for name, hidden, depth, bar in SIZES:
        model: Any = llama(hidden, depth)
        ids = torch.randint(1, VOCAB, (1, PROMPT))
        made = gatecc.decoder(model, (ids,), capacity=PROMPT + NEW)

        def theirs(model: Any = model, ids: torch.Tensor = ids) -> torch.Tensor:
            with torch.no_grad():
                return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)

        def ours(made: gatecc.Decoder = made, ids: torch.Tensor = ids) -> torch.Tensor:
            return made.generate(ids, NEW)

        assert torch.equal(theirs(), ours())
        theirs_s, ours_s = best_of(theirs, ours, repeats=6)
        yield Row(f"{name}: speed against generate", theirs_s / ours_s, bar, at_most=False, unit="x")
        yield Row(f"{name}: gatecc", NEW / ours_s, unit="tokens/s")
        yield Row(f"{name}: transformers", NEW / theirs_s, unit="tokens/s")


if __name__ == "__main__":
    main("decoder", lambda: list(measure()))
