"""The models of benchmarks/compile.py: hidden 256, few layers, random weights. Nothing is downloaded.

A class of models shares a bar, the least speed against Inductor. The names of rows say everything that matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import transformers as hf
from torch import nn
from torch.nn import functional

import gatecc

Made = tuple[nn.Module, dict[str, Any]]
HIDDEN, HEADS, LAYERS, VOCAB = 256, 4, 2, 1000
BARS = {  # class -> least speed, compiled by Inductor being 1
    "causal 1024": 1.1,
    "causal 2048": 1.25,
    "causal 1024 eager": 1.5,
    "causal 512 eager": 1.3,
    "bidirectional": 0.98,
    "bidirectional eager": 0.98,
    "experts 512 rows": 1.05,
    "experts E=64 k=8": 1.15,
    "experts loop": 1.3,
    "gated": 0.98,
    "linear attention": 10.0,
}


@dataclass(frozen=True)
class Case:
    """One model. ``make`` builds it and the inputs of a call; ``plain``: the model whose time a gated one must keep."""

    name: str
    kind: str
    make: Callable[[], Made]
    plain: Callable[[], Made] | None = None


def language(model: str, length: int, attention: str = "sdpa", **more: Any) -> Callable[[], Made]:
    """A decoder of transformers over one sequence."""

    def make() -> Made:
        sizes = dict(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, use_cache=False
        )
        ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=4096)
        wide = {} if model in ("gpt2", "bloom", "mpt", "falcon") else dict(intermediate_size=4 * HIDDEN)
        if model == "gpt2":
            sizes |= dict(n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=4096)
        heads = dict(num_key_value_heads=2, head_dim=64) if model == "qwen3" else {}
        config: Any = hf.AutoConfig.for_model(model, **sizes, **ids, **wide, **heads, **more)
        made = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        return made.eval(), {"input_ids": torch.randint(3, VOCAB, (1, length)), "use_cache": False}

    return make


def encoder(model: str, length: int, attention: str = "sdpa", **more: Any) -> Callable[[], Made]:
    """An encoder of transformers over two sequences."""

    def make() -> Made:
        config: Any = hf.AutoConfig.for_model(
            model,
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=4 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            **more,
        )
        made = hf.AutoModel.from_config(config, attn_implementation=attention)
        return made.eval(), {"input_ids": torch.randint(3, VOCAB, (2, length))}

    return make


def image(attention: str) -> Made:
    """A ViT of transformers."""
    config: Any = hf.ViTConfig(
        hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS
    )
    config._attn_implementation = attention
    return hf.ViTModel(config).eval(), {"pixel_values": torch.randn(2, 3, 224, 224)}


def of_timm(model: str, **more: Any) -> Callable[[], Made]:
    """A model of timm with few blocks."""
    return lambda: (timm.create_model(model, **more).eval(), {"x": torch.randn(2, 3, 224, 224)})


class Experts(nn.Module):
    """The mixture of a decoder layer of transformers, over hidden: (1, N, 256)."""

    def __init__(self, config: Any, implementation: str) -> None:
        super().__init__()
        config._experts_implementation = implementation
        model: Any = hf.AutoModelForCausalLM.from_config(config)
        self.mlp: nn.Module = model.model.layers[0].mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden)


def experts(model: str, number: int, chosen: int, rows: int, implementation: str) -> Callable[[], Made]:
    """A mixture whose experts get ``rows`` rows each on average."""

    def make() -> Made:
        name = "num_local_experts" if model == "mixtral" else "num_experts"
        config: Any = hf.AutoConfig.for_model(
            model,
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_experts_per_tok=chosen,
            **{name: number},
        )
        return Experts(config, implementation).eval(), {"hidden": torch.randn(1, rows * number // chosen, HIDDEN)}

    return make


def gated(plain: Callable[[], Made], recipe: Any = "gated-attention") -> Callable[[], Made]:
    """A model with gates on its attention heads."""

    def make() -> Made:
        model, inputs = plain()
        return gatecc.transform(model, recipe, inputs), inputs

    return make


class ByHand(nn.Module):
    """Decoder blocks written as tutorials do: softmax(q k^T / sqrt(d) + triangle) v. ids: (1, N)."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.qkv = nn.ModuleList(nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.ones(length, length).tril().bool())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
            weights = scores.masked_fill(~self.seen[: ids.size(1), : ids.size(1)], float("-inf")).softmax(-1)
            x = x + out((weights @ v).transpose(1, 2).flatten(2))
        return self.head(x)


class Chunks(nn.Module):
    """Gated linear attention in chunks, as papers print it: decays per head, chunks of 64. x: (1, N, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.decay = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HEADS)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        logs = functional.logsigmoid(self.decay(x)).transpose(1, 2)
        state = q.new_zeros(q.size(0), HEADS, q.size(-1), v.size(-1))
        parts: list[torch.Tensor] = []
        for qc, kc, vc, log in zip(*(t.split(64, 2) for t in (q, k, v, logs)), strict=True):
            total = log.cumsum(-1)
            within = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
            inner = ((qc @ kc.transpose(-2, -1)) * within) @ vc
            parts.append(inner + (qc * total.exp()[..., None]) @ state)
            rest = (total[..., -1:] - total).exp()[..., None]
            state = state * total[..., -1:, None].exp() + (kc * rest).transpose(-2, -1) @ vc
        return self.out(torch.cat(parts, 2).transpose(1, 2).flatten(2))


class Loop(Chunks):
    """The same, token by token."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        decay = torch.sigmoid(self.decay(x)).transpose(1, 2)
        state = q.new_zeros(q.size(0), HEADS, q.size(-1), v.size(-1))
        parts: list[torch.Tensor] = []
        for t in range(x.size(1)):
            state = state * decay[:, :, t, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
            parts.append((q[:, :, t, None, :] @ state)[..., 0, :])
        return self.out(torch.stack(parts, 2).transpose(1, 2).flatten(2))


def block(model: type[nn.Module], length: int) -> Callable[[], Made]:
    """A block over hidden states."""
    return lambda: (model().eval(), {"x": torch.randn(1, length, HIDDEN)})


CASES = (
    *(Case(f"{m} 1024", "causal 1024", language(m, 1024)) for m in ("llama", "qwen3", "gpt2", "opt", "gpt_neox")),
    *(Case(f"{m} 2048", "causal 2048", language(m, 2048)) for m in ("llama", "gpt_neox")),
    *(
        Case(f"{m} 1024 eager", "causal 1024 eager", language(m, 1024, "eager"))
        for m in ("llama", "qwen3", "gpt2", "gpt_neox")
    ),
    Case("by hand 1024", "causal 1024 eager", lambda: (ByHand(1024).eval(), {"ids": torch.randint(VOCAB, (1, 1024))})),
    *(Case(f"{m} 512 eager", "causal 512 eager", language(m, 512, "eager")) for m in ("llama", "gpt2", "bloom")),
    *(Case(f"{m} 512", "bidirectional", encoder(m, 512)) for m in ("bert", "roberta", "modernbert")),
    Case("vit 197", "bidirectional", lambda: image("sdpa")),
    Case("timm vit_tiny 197", "bidirectional", of_timm("vit_tiny_patch16_224", depth=LAYERS)),
    Case("timm swin_tiny", "bidirectional", of_timm("swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1))),
    *(Case(f"{m} 512 eager", "bidirectional eager", encoder(m, 512, "eager")) for m in ("bert", "roberta")),
    Case("vit 197 eager", "bidirectional eager", lambda: image("eager")),
    Case("mixtral experts", "experts 512 rows", experts("mixtral", 8, 2, 512, "grouped_mm")),
    Case("qwen3_moe experts", "experts E=64 k=8", experts("qwen3_moe", 64, 8, 128, "grouped_mm")),
    Case("mixtral experts loop", "experts loop", experts("mixtral", 8, 2, 128, "eager")),
    Case("gated llama 1024", "gated", gated(language("llama", 1024)), language("llama", 1024)),
    Case("gated bert 512", "gated", gated(encoder("bert", 512)), encoder("bert", 512)),
    Case("linear attention, chunks 2048", "linear attention", block(Chunks, 2048)),
    Case("linear attention, tokens 128", "linear attention", block(Loop, 128)),
)
