"""Qwen3-MoE: a Qwen3 with experts, in some layers or in all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gatecc.handoff.source import Source
from gatecc.handoff.target import Target, alike, stacked, ungated


class Qwen3Moe(Target):
    """Norms of queries and keys, no shared expert."""

    name = "qwen3_moe"
    prefix = "Qwen3Moe"
    windowed = True

    def options(self, source: Source) -> dict[str, Any]:
        ungated(source)
        one = alike(source, dense=True)
        return {
            "num_experts": one.experts,
            "num_experts_per_tok": one.k,
            "moe_intermediate_size": one.hidden,
            "norm_topk_prob": one.renorm,
            "mlp_only_layers": source.dense,
            "intermediate_size": source.config.intermediate_size,
            "attention_bias": bool(getattr(source.config, "attention_bias", False)),
        }

    def state(self, source: Source) -> dict[str, Tensor]:
        return source.rest | stacked(source)
