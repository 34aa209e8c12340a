"""Hand-off: rewritten models against the classes of transformers that they are written as, and the time that it takes.

``python benchmarks/handoff.py [--check]``
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _table import Row, cpu_seconds, main
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import gatecc

SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
NEW = 16


def cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    """A dense model and the options of its upcycling, by what it becomes."""
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()
    qwen = Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, head_dim=16)).eval()
    return {
        "Llama -> Mixtral": (llama, {"experts": 8, "k": 2}),
        "Llama + shared -> Qwen2-MoE": (llama, {"experts": 8, "k": 2, "how": "gated-shared"}),
        "Qwen3 -> Qwen3-MoE": (qwen, {"experts": 8, "k": 2}),
    }


def trained(model: Any) -> Any:
    """As after training: experts and routers that differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def measure() -> Sequence[Row]:
    """Logits, tokens and time of each case."""
    torch.manual_seed(0)
    ids = torch.randint(SIZES["vocab_size"], (4, 32))
    rows: list[Row] = []
    for name, (dense, options) in cases().items():
        model = trained(gatecc.transform(dense, gatecc.recipe("upcycle", **options), {"input_ids": ids}))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            seconds = cpu_seconds(lambda to=Path(folder) / "x", m=model: gatecc.to_transformers(m, to))
            again: Any = AutoModelForCausalLM.from_pretrained(Path(folder) / "x").eval()
            ours, theirs = (m(input_ids=ids).logits for m in (model, again))
            error = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1))
            made = [m.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0) for m in (model, again)]
        other = float(made[0].ne(made[1]).sum()) if made[0].shape == made[1].shape else float("inf")
        rows += [Row(f"{name}: logits", error, 1e-5), Row(f"{name}: other tokens in generate", other, 0)]
        rows += [Row(f"{name}: to_transformers", seconds, unit="s of CPU")]
    return rows


if __name__ == "__main__":
    main("handoff", measure)
