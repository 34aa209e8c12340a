"""Qwen2-MoE: experts beside a shared one that a sigmoid scales, in some layers or in all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gatecc.handoff.shared_expert import shared_options, shared_state
from gatecc.handoff.source import Source
from gatecc.handoff.target import Target, alike, stacked, ungated
from gatecc.handoff.windows import windows


class Qwen2Moe(Target):
    """Queries, keys and values all have biases or none has; no norms of queries and keys."""

    name = "qwen2_moe"
    prefix = "Qwen2Moe"
    windowed = True

    def options(self, source: Source) -> dict[str, Any]:
        ungated(source)
        seen = windows(source.config)
        kinds = ["full_attention" if window is None else "sliding_attention" for window in seen]
        return {
            **shared_options(source, alike(source, dense=True, shared=True)),
            "intermediate_size": source.config.intermediate_size,
            "qkv_bias": any(name.endswith("q_proj.bias") for name in source.rest),
            "use_sliding_window": any(seen),
            "layer_types": kinds,
        }

    def state(self, source: Source) -> dict[str, Tensor]:
        return source.rest | stacked(source) | shared_state(source)
