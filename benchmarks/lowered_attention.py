"""Attention that torch.compile(backend="gatecc") lowers: how many of the cores that run, and what it gains.

``python benchmarks/lowered_attention.py [--check]``; ``GATECC_ROWS=count`` or ``GATECC_ROWS=time`` for one half.

Counted on 29 eager variants with 80 cores, inference and training, of which Inductor's own matcher finds 24 and 4 (the
project's facts, torch 2.14.1). Recognised: a lowering has an outcome for it, a replacement or a reason. Timed: whole
models of 2 layers and width 256, compiled by Inductor and by gatecc, in turn, best of several, with a second
compilation by Inductor as a control.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _table import Row, best_of, main

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import fx

from gatecc import backend
from tests.zoo.models import find

_DECODERS = "llama qwen2 mixtral gemma2 gpt2 gpt_neox bloom mpt falcon opt"
_OTHERS = "bert distilbert deberta_v2 xlnet t5 bart whisper vit clip swin sam"
_HAND = "tril einsum gqa_repeat cross_attention sliding alibi"
VARIANTS = [
    *(f"hf/{name}-eager" for name in f"{_DECODERS} {_OTHERS}".split()),
    "timm/cait-eager",
    "torch/mha_weights",
    *(f"hand/{name}" for name in _HAND.split()),
]
SIZES: dict[str, Any] = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4)
TEXT = SIZES | dict(vocab_size=512, max_position_embeddings=4096)
FALCON: dict[str, Any] = dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=512, alibi=False)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", TEXT, "eager"),
    "llama, heads of 32": ("LlamaConfig", TEXT | dict(num_attention_heads=8), "eager"),
    "gpt_neox": ("GPTNeoXConfig", TEXT, "eager"),
    "bert": ("BertConfig", TEXT, "eager"),
    "falcon": ("FalconConfig", FALCON, "sdpa"),
}
TIMES = [  # model, length, the least gain
    ("llama", 512, 1.3),
    ("llama", 1024, 1.5),
    ("llama, heads of 32", 512, 1.3),
    ("llama, heads of 32", 1024, 1.5),
    ("gpt_neox", 512, 1.3),
    ("gpt_neox", 1024, 1.5),
    ("bert", 512, 0.98),
    ("falcon", 1024, 1.1),
    ("falcon", 2048, 1.25),
]


def recognised(name: str, training: bool) -> tuple[int, int, int, int]:
    """Cores that run, that a lowering has an outcome for, that it replaced, and that are in graphs which are not looked
    at (bloom's in training calls an autograd.Function)."""
    spec = find(name)
    case = spec.build()
    case.model.train(training)
    outcomes: list[Any] = []
    untouched: list[str] = []

    def spy(graph_module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        lowered = backend.lower(graph_module, example)
        outcomes.extend(lowered.outcomes)
        untouched.extend([lowered.untouched] if lowered.untouched else [])
        return graph_module.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        torch.compile(case.model, backend=spy)(*case.args, **case.kwargs)
    mine = [o for o in outcomes if o.lowering == "spelled-attention"]
    missed = spec.cores - len(mine) if untouched else 0
    return spec.cores, len(mine), sum(bool(o.became) for o in mine), missed


def counted() -> Iterator[Row]:
    """Rows of the counts."""
    for training in (False, True):
        ran, seen, lowered, missed = map(sum, zip(*(recognised(name, training) for name in VARIANTS), strict=True))
        what = "training" if training else "inference"
        fused = 1  # hand/cross_attention calls the fused operator once
        yield Row(
            f"cores that run: read, fused already, or left with a reason, {what}",
            seen + fused + missed,
            ran,
            at_most=False,
        )
        yield Row(f"of them in graphs that are not looked at, {what}", missed, 2)
        yield Row(f"of them lowered (a short bias is not), {what}", lowered)


def work(model: Any, engine: str, ids: torch.Tensor) -> Callable[[], object]:
    """A call of a copy of a model that an engine compiles."""
    run = torch.compile(copy.deepcopy(model), backend=engine, dynamic=False)
    keep: dict[str, Any] = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    return lambda: run(input_ids=ids, **keep)


def timed() -> Iterator[Row]:
    """Rows of the times."""
    transformers: Any = importlib.import_module("transformers")
    wanted = os.environ.get("GATECC_MODELS", "")
    for name, length, bar in TIMES:
        if wanted and f"{name}@{length}" not in wanted.split(";"):
            continue
        config, options, attention = MODELS[name]
        config = getattr(transformers, config)(**options)
        model = transformers.AutoModel.from_config(config, attn_implementation=attention).eval()
        ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(0))
        works = [work(model, engine, ids) for engine in ("inductor", "gatecc", "inductor")]
        with torch.no_grad():
            for each in works:
                each()
            one, other, control = best_of(*works, repeats=9)
        yield Row(f"{name} ({attention}), {length} tokens, against Inductor", one / other, bar, at_most=False)
        yield Row(f"{name}, {length} tokens, Inductor against itself", one / control)
        torch._dynamo.reset()


def measure() -> Iterator[Row]:
    """The rows of the benchmark."""
    half = os.environ.get("GATECC_ROWS", "")
    if half != "time":
        yield from counted()
    if half != "count":
        yield from timed()


if __name__ == "__main__":
    main("lowered_attention", lambda: list(measure()))
