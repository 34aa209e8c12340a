"""Upcycled models against dense ones at step 0: eight architectures, every mode that is exact, float32.

``python benchmarks/upcycling.py [ARCHITECTURE ...] [--check]``, or ``python benchmarks/experts.py upcycling``. A row is
the worst of the modes: the norm of the difference of the outputs, relative to that of the dense model's. What the
report says is checked along the way: `transform` raises if a model does not start as its contract promises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from _table import Row, main
from torch import Tensor, nn

import gatecc
from gatecc.ir.router import RouterSpec
from gatecc.passes.route.route import Route
from gatecc.passes.route.spec import ExpertsSpec

BAR = 3e-7
MODES = (  # experts, choice, init of the router
    ("copies(8)", "softmax_topk(2)", "random(0.02)"),
    ("copies(8)", "softmax_topk(1, straight=True)", "random(0.02)"),
    ("copies(8)", "softmax_topk(2, renorm=False)", "zero"),
    ("copies(4, extra=16)", "softmax_topk(2)", "random(0.02)"),
    ("shared(copies(4), gated=True)", "softmax_topk(2, renorm=False)", "random(0.02)"),
    ("split(4, by=kmeans)", "unweighted(4)", "similar"),
    ("split(8, by=random)", "softmax_topk(8)", "zero"),
    ("groups(4, 2)", "per_group(4)", "random(0.02)"),
)
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def architectures() -> dict[str, Callable[[], nn.Module]]:
    """Models of two layers by name."""
    import timm
    import transformers as hf

    def vit() -> nn.Module:
        sizes: dict[str, Any] = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
            "num_classes": 5,
        }
        return timm.create_model("vit_tiny_patch16_224", **sizes)

    def gpt2() -> nn.Module:
        sizes: dict[str, Any] = {
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes))

    def t5() -> nn.Module:
        sizes: dict[str, Any] = {
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
        }
        return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, feed_forward_proj="gated-gelu"))

    return {
        "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2)),
        "GPT-2": gpt2,
        "Qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, num_key_value_heads=2)),
        "Gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8)),
        "Phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)),
        "T5": t5,
        "BERT": lambda: hf.BertModel(hf.BertConfig(**SIZES)),
        "ViT": vit,
    }


def rows(names: Sequence[str] = ()) -> Iterator[Row]:
    """One row an architecture."""
    torch.set_num_threads(1)
    known = architectures()
    for name in names or known:
        make = known[name]
        torch.manual_seed(0)
        model = make().eval()
        inputs = _inputs(name)
        before = _output(model, inputs)
        errors = {mode: _error(model, inputs, before, *mode) for mode in MODES}
        worst = max(errors, key=errors.__getitem__)
        yield Row(f"{name}: worst of {len(MODES)} modes, {worst[0]}", errors[worst], BAR)


def _error(model: nn.Module, inputs: Any, before: Tensor, experts: str, choice: str, init: str) -> float:
    route = Route("mlp[...]", RouterSpec("in", "linear(bias=False)", choice, init), ExpertsSpec.parse(experts))
    if route.contract().kind != "identity_at_init":
        raise SystemExit(f"{experts} with {choice}: {route.contract()}")
    after = _output(gatecc.transform(model, route, inputs), inputs)
    return float((after - before).norm() / before.norm())


def _inputs(name: str) -> Any:
    generator = torch.Generator().manual_seed(0)
    if name == "ViT":
        return (torch.randn(2, 3, 32, 32, generator=generator),)
    ids = torch.randint(0, 64, (2, 9), generator=generator)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "T5" else {})


@torch.no_grad()
def _output(model: nn.Module, inputs: Any) -> Tensor:
    made = model(*inputs) if isinstance(inputs, tuple) else model(**inputs)
    return made if isinstance(made, Tensor) else made[0]


if __name__ == "__main__":
    chosen = [a for a in sys.argv[1:] if a in architectures()]
    main("upcycling", lambda: list(rows(chosen)), [a for a in sys.argv[1:] if a not in chosen])
