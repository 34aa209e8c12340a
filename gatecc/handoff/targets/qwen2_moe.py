"""Qwen2-MoE: experts beside a shared one that a sigmoid scales, in some layers or in all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gatecc.handoff.source import Source, zeros_like
from gatecc.handoff.target import Target, alike, stacked
from gatecc.handoff.unfit import UnfitError

_IDLE = 8  # the width of a shared expert that is all zeros, where the model has none


class Qwen2Moe(Target):
    """Queries, keys and values all have biases or none has; no norms of queries and keys."""

    name = "qwen2_moe"
    prefix = "Qwen2Moe"

    def options(self, source: Source) -> dict[str, Any]:
        one = alike(source, dense=True)
        widths = {m.shared[1].size(0) if m.shared else _IDLE for m in source.mixtures.values()}
        if len(widths) > 1:
            raise UnfitError(f"its shared experts are of one width, the model's of {sorted(widths)}")
        return {
            "num_experts": one.experts,
            "num_experts_per_tok": one.k,
            "moe_intermediate_size": one.hidden,
            "shared_expert_intermediate_size": widths.pop(),
            "norm_topk_prob": one.renorm,
            "mlp_only_layers": source.dense,
            "intermediate_size": source.config.intermediate_size,
            "qkv_bias": any(name.endswith("q_proj.bias") for name in source.rest),
        }

    def state(self, source: Source) -> dict[str, Tensor]:
        found = source.rest | stacked(source)
        for owner, mixture in source.mixtures.items():
            d = mixture.router.size(1)
            idle = [zeros_like(mixture.router, *s) for s in ((1, d), (_IDLE, d), (_IDLE, d), (d, _IDLE))]
            names = "shared_expert_gate", "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"
            for name, weight in zip(names, mixture.shared or idle, strict=True):
                found[f"{owner}.{name}.weight"] = weight
        return found
