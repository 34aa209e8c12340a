"""Mixtral: a Llama or Mistral whose every layer has experts, weighed by a softmax over those that were chosen."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gatecc.handoff.source import Source
from gatecc.handoff.target import Target, alike, stacked, ungated
from gatecc.handoff.unfit import UnfitError


class Mixtral(Target):
    """No biases, no norms of queries and keys, no shared expert."""

    name = "mixtral"
    prefix = "Mixtral"
    windowed = True

    def options(self, source: Source) -> dict[str, Any]:
        ungated(source)
        one = alike(source, dense=False)
        if not one.renorm:
            raise UnfitError(
                "its weights are divided by their sum (norm), the model's are the probabilities themselves"
            )
        return {"num_local_experts": one.experts, "num_experts_per_tok": one.k, "intermediate_size": one.hidden}

    def state(self, source: Source) -> dict[str, Tensor]:
        return source.rest | stacked(source)
