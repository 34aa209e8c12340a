"""Section of dynamic.py: drafts that would be rejected are not drafted (SpecDec++)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from _table import Row, best_of
from transformers import LlamaConfig, LlamaForCausalLM

import gatecc
from gatecc.train import drafts, fit_acceptance


def _llama(width: int, layers: int) -> Any:
    shape: Any = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.2, **shape, **heads)).eval()


def speculation() -> Iterator[Row]:
    """Time of 32 tokens where draft and target never agree, with the rule and with drafts of 8 tokens."""
    target, draft = _llama(256, 4), _llama(128, 2)
    ids = torch.randint(0, 256, (1, 16))
    large, small = gatecc.decoder(target, (ids,)), gatecc.decoder(draft, (ids,))
    rule = fit_acceptance(drafts(target, draft, [torch.randint(0, 256, (4, 64))]))
    stopped, whole = best_of(
        lambda: large.speculate(small, ids, 32, rule=rule),
        lambda: large.speculate(small, ids, 32, bound=8),
        repeats=5,
    )
    found = large.speculate(small, ids, 32, rule=rule)
    yield Row("drafts: tokens drafted in each round with the rule", found.drafted / found.rounds, 3)
    yield Row("drafts: time with the rule, of drafts of 8 tokens", stopped / whole, 0.8, unit="x")
