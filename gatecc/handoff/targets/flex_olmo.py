"""FlexOlmo: an OLMo 2 whose every layer has experts: queries and keys are normalised over their full width, and the
results of attention and experts once more."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gatecc.handoff.source import Source
from gatecc.handoff.target import Target, alike, stacked, ungated


class FlexOlmo(Target):
    """No shared expert."""

    name = "flex_olmo"
    prefix = "FlexOlmo"

    def options(self, source: Source) -> dict[str, Any]:
        ungated(source)
        one = alike(source, dense=False)
        return {
            "num_experts": one.experts,
            "num_experts_per_tok": one.k,
            "intermediate_size": one.hidden,
            "norm_topk_prob": one.renorm,
            "attention_bias": any(name.endswith("q_proj.bias") for name in source.rest),
        }

    def state(self, source: Source) -> dict[str, Tensor]:
        return source.rest | stacked(source)
