"""The parts of examples/evict.py, on a small model with a few steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples import evict


def test_memory_goes_with_the_share_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evict, "SHARES", (1.0, 0.4))
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 256}
    plain = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).eval()
    stream = torch.randint(0, 256, (2000,)).byte()
    dense, everything, some = evict.on_bytes(plain, stream, stream, steps=3, windows=2, length=256)
    assert everything.share == 1.0
    assert everything.bits == pytest.approx(dense.bits)
    assert 0.2 < some.share < 0.6
    assert some.size < 0.75 * everything.size
    assert everything.size < 1.25 * dense.size  # room to grow for both classes of tokens
