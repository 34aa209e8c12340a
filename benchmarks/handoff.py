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
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import gatecc
from gatecc.passes.route.route import Route

SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
NEW = 16


def cases() -> dict[str, tuple[Any, list[Any]]]:
    """A dense model and what is done to it, by what it becomes."""
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()
    qwen = Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, head_dim=16)).eval()
    olmo = Olmo2ForCausalLM(Olmo2Config(**SIZES, **HEADS, pad_token_id=0, eos_token_id=1)).eval()
    gates = list(gatecc.recipe("gated-attention", granularity="element").rewrites)
    kept = list(gatecc.recipe("gated-attention", granularity="element", sites="attention[model.layers.1.*]").rewrites)
    delta = list(gatecc.recipe("gated-delta-net", form="qwen3-next", keep="1").rewrites)
    choice = "in, linear(bias=False), sigmoid_topk(4, groups=4, limit=2, bias=True, scale=2.5)"
    fine = Route(gatecc.MLP[...], choice, "shared(split(16))")
    return {
        "Llama -> Mixtral": (llama, upcycled()),
        "Llama + shared -> Qwen2-MoE": (llama, upcycled(how="gated-shared")),
        "Qwen3 -> Qwen3-MoE": (qwen, upcycled()),
        "OLMo 2 -> FlexOlmo": (olmo, upcycled()),
        "Llama + sigmoid, shared -> GLM-4.5": (llama, upcycled(how="shared", scores="sigmoid")),
        "Qwen3 + fine experts in groups, shared -> GLM-4.5": (qwen, [fine]),
        "Qwen3 + gates -> Qwen3-Next": (qwen, gates),
        "Qwen3 + gated delta rules -> Qwen3-Next": (qwen, delta),
        "Qwen3 + delta rules, gates, experts -> Qwen3-Next": (qwen, [*delta, *kept, *upcycled(how="gated-shared")]),
        "Qwen3 + gates, experts -> Qwen3-Next": (qwen, [*gates, *upcycled(how="gated-shared")]),
    }


def upcycled(**options: Any) -> list[Any]:
    """The rewrites of the recipe."""
    return list(gatecc.recipe("upcycle", experts=8, k=2, **options).rewrites)


def trained(model: Any) -> Any:
    """As after training: experts and routers that differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def measure() -> Sequence[Row]:
    """Logits, tokens and time of each case."""
    torch.manual_seed(0)
    ids = torch.randint(SIZES["vocab_size"], (4, 80))
    rows: list[Row] = []
    for name, (dense, rewrites) in cases().items():
        model = trained(gatecc.transform(dense, rewrites, {"input_ids": ids}))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            seconds = cpu_seconds(lambda to=Path(folder) / "x", m=model: gatecc.to_transformers(m, to))
            again: Any = AutoModelForCausalLM.from_pretrained(Path(folder) / "x").eval()
            ours, theirs = (m(input_ids=ids).logits for m in (model, again))
            error = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1))
            options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
            made = [m.generate(ids, attention_mask=torch.ones_like(ids), **options) for m in (model, again)]
        other = float(made[0].ne(made[1]).sum()) if made[0].shape == made[1].shape else float("inf")
        rows += [Row(f"{name}: logits", error, 1e-5), Row(f"{name}: other tokens in generate", other, 0)]
        rows += [Row(f"{name}: to_transformers", seconds, unit="s of CPU")]
    return rows


if __name__ == "__main__":
    main("handoff", measure)
